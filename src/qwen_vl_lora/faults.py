"""Messages for machine faults: disk full, no permission, out of memory, closed output.

Libraries report them as OSError, as MemoryError, or as a RuntimeError whose text names the cause.
This module knows neither Kedro nor torch, nor what the run was doing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_vl_lora.exceptions import MachineError, QwenVLLoraError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)

_NUMBER = re.compile(r"(?:os error|Error code|\[Errno) (\d+)")  # in messages of Rust, torch and Python
_STRERROR = re.compile(r"strerror: ([\w ()/-]+)")
_TORCH_WRITER = "inline_container.cc"  # torch.save reports a full disk only as a file that is too short
_NO_MEMORY = ("std::bad_alloc", "can't allocate memory", "CUDA out of memory", "can't start new thread")
_ASKED_BYTES = re.compile(r"tried to allocate (\d+) bytes")

_WHOLE = "No partial file is visible; earlier results are unchanged."


def machine_fault(error: BaseException) -> MachineError | None:
    """Return the machine fault that `error` reports, or None. The causes of `error` are not searched."""
    number = _errno(error)
    if number is None:
        return None
    # For a rename, report the target: it is the place that cannot be written.
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f" ({path})" if path else ""
    if number in _FULL:
        return MachineError(
            f"No space left to write{where}: {os.strerror(number)}. {_free_space(path)} {_WHOLE} Free some space, or "
            "move data/ to a larger disk, and repeat the command: it resumes from what is saved."
        )
    if number == errno.ENOMEM:
        return MachineError(_memory_message(error))
    if number == errno.EROFS:
        return MachineError(
            f"Cannot write{where}: the filesystem is mounted read-only. {_WHOLE} Copy the project to a writable "
            "folder, or remount the disk for writing. The kernel may do this after a disk error: "
            "check `dmesg`."
        )
    if number in _REFUSED:
        return MachineError(
            f"Access denied{where}: {os.strerror(number)}. {_ownership(path)} {_WHOLE} Give this user access "
            "(chown, chmod), or run as the owner of the files."
        )
    return _other_fault(number, where)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether main memory or GPU memory is exhausted."""
    return _errno(error) == errno.ENOMEM


def _other_fault(number: int, where: str) -> MachineError | None:
    match number:
        case errno.EPIPE:
            return MachineError(
                "The command stopped because its output was closed (a pipe or terminal that is gone). "
                f"{_WHOLE} To run without a reader, write to a file: kedro run > run.log 2>&1."
            )
        case errno.EMFILE | errno.ENFILE:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return MachineError(f"Too many open files{where}; the limit is {soft}. Raise it (ulimit -n). {_WHOLE}")
        case errno.EXDEV:
            return MachineError(
                f"Cannot move a finished file into place{where}: its folder is on another disk. All of data/ must be "
                "on one filesystem, because artifacts are published by a rename. Link data/ as a whole, not a "
                f"folder in it. {_WHOLE}"
            )
        case errno.ENAMETOOLONG:
            return MachineError(f"File name longer than the filesystem allows{where}. Shorten it. {_WHOLE}")
        case errno.EIO:
            return MachineError(f"Disk input/output failed{where}: {os.strerror(number)}. Check `dmesg`. {_WHOLE}")
    return None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError":
        return _errno_of_text(str(error))
    return None


def _errno_of_text(text: str) -> int | None:
    if any(sign in text for sign in _NO_MEMORY):
        return errno.ENOMEM
    if number := _NUMBER.search(text):
        return int(number[1])
    if said := _STRERROR.search(text):
        return next((number for number in errno.errorcode if os.strerror(number) == said[1].strip()), None)
    return errno.ENOSPC if _TORCH_WRITER in text and "unexpected pos" in text else None


def _memory_message(error: BaseException) -> str:
    said = " ".join(str(error).split())
    if "CUDA" in said:
        figures = said.partition(" If reserved")[0].partition(" Process ")[0]
        return (
            f"GPU memory is too small for this run: {figures} {_WHOLE} Set per_device_train_batch_size: auto or "
            "lower it, set training_args.gradient_checkpointing: true or quantization: nf4, or use a smaller image "
            "size; for captioning, lower generation.batch_size."
        )
    asked = _ASKED_BYTES.search(said)
    wanted = f"One allocation requested {shown_bytes(int(asked[1]))}. " if asked else f"{said}. " if said else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = "" if limit == resource.RLIM_INFINITY else f"; its limit (ulimit -v) is {shown_bytes(limit)}"
    return (
        f"Out of main memory. {wanted}This process used {shown_bytes(peak)} at its peak{limited}. {_WHOLE} Lower "
        "per_device_train_batch_size, the image size or image.max_source_pixels, or close other programs."
    )


def _free_space(path: object) -> str:
    """Describe the free space of every disk that a run writes to, fullest first; unreadable ones are left out."""
    disks: dict[int, tuple[int, str]] = {}
    for place in _written_places(path):
        with contextlib.suppress(OSError):
            facts = os.statvfs(place)
            free, size = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
            inodes = ", no free inodes" if facts.f_files and not facts.f_favail else ""
            shown = f"{shown_bytes(free)} of {shown_bytes(size)} in {place}{inodes}"
            disks.setdefault(place.stat().st_dev, (free, shown))
    return f"Free now: {'; '.join(text for _, text in sorted(disks.values()))}." if disks else ""


def _written_places(path: object) -> Iterator[Path]:
    """Yield folders on the disks that a run writes to; working and temporary directories may no longer exist."""
    if isinstance(path, (str, os.PathLike)):
        with contextlib.suppress(OSError):
            yield _existing(Path(path))
    with contextlib.suppress(OSError):
        here = Path.cwd()
        yield here
        yield from sorted((here / "data").glob("*/"))
    with contextlib.suppress(OSError):  # tempfile found no writable folder
        yield Path(tempfile.gettempdir())


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _ownership(path: object) -> str:
    user = f"This process runs as user {os.geteuid()}"
    if not isinstance(path, (str, os.PathLike)):
        return f"{user}."
    try:
        place = next(place for place in (Path(path), *Path(path).absolute().parents) if os.path.lexists(place))
        facts = place.stat()
    except OSError:  # its owner cannot be read either
        return f"{user}."
    return f"{user}; {place} belongs to user {facts.st_uid} with mode {facts.st_mode & 0o777:o}."


def shown_bytes(count: float) -> str:
    """Return a size such as `3.1 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@contextlib.contextmanager
def library_faults(in_words: Callable[[str], QwenVLLoraError]) -> Iterator[None]:
    """Convert errors of libraries on damaged files. The project's own errors and the machine's pass unchanged.

    Args:
        in_words: gives the error to raise for the library's kind of error and message, in one line.
    """
    try:
        yield
    except QwenVLLoraError:
        raise
    except Exception as error:
        if machine_fault(error) is not None:
            raise
        raise in_words(" ".join(f"{type(error).__name__}: {error}".split())) from error
