"""What a machine's faults mean to the person in front of it: no room, no permission, no memory, nobody reading.

Libraries report them as OSError, as MemoryError, or as a RuntimeError whose text alone says what happened.
Knows neither Kedro nor torch, and nothing of what the run was doing.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import sys
import tempfile
from pathlib import Path

from qwen_vl_lora.exceptions import MachineError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM)

_NUMBER = re.compile(r"(?:os error|Error code|\[Errno) (\d+)")  # of Rust's, torch's and Python's own messages
_STRERROR = re.compile(r"strerror: ([\w ()/-]+)")
_TORCH_WRITER = "inline_container.cc"  # torch.save says only that the file is shorter than it should be
_NO_MEMORY = ("std::bad_alloc", "can't allocate memory", "CUDA out of memory", "can't start new thread")
_ASKED_BYTES = re.compile(r"tried to allocate (\d+) bytes")

_WHOLE = "Nothing half-written is visible, and what was saved before is as it was."


def machine_fault(error: BaseException) -> MachineError | None:
    """The fault of the machine that `error` tells of, in words; None if it tells of none. Causes are not searched."""
    number = _errno(error)
    if number is None:
        return None
    # Of a rename, its target: that is the place which refuses.
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = f" ({path})" if path else ""
    if number in _FULL:
        return MachineError(
            f"There is no room left to write{where}: {os.strerror(number)}. {_free_space(path)} {_WHOLE} Make room, or "
            "move data/ to a larger disk, and give the same command again: it goes on from what is saved."
        )
    if number == errno.ENOMEM:
        return MachineError(_memory_message(error))
    if number == errno.EROFS:
        return MachineError(
            f"Writing was refused{where}: the filesystem is mounted read-only. {_WHOLE} Copy the project to a folder "
            "that can be written, or have the disk mounted for writing; after a disk error it may have become so by "
            "itself (`dmesg` says)."
        )
    if number in _REFUSED:
        return MachineError(
            f"Access was refused{where}: {os.strerror(number)}. {_ownership(path)} {_WHOLE} Give this user the right "
            "(chown, chmod), or run as the user whom the files belong to."
        )
    return _other_fault(number, where)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether main memory or a GPU's is used up."""
    return _errno(error) == errno.ENOMEM


def _other_fault(number: int, where: str) -> MachineError | None:
    match number:
        case errno.EPIPE:
            return MachineError(
                "Nobody reads this command's output any more (a closed pipe or terminal), so it stopped. "
                f"{_WHOLE} To go on without a reader, write to a file: kedro run > run.log 2>&1."
            )
        case errno.EMFILE | errno.ENFILE:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return MachineError(f"Too many files are open{where}; the limit is {soft}. Raise it (ulimit -n). {_WHOLE}")
        case errno.EXDEV:
            return MachineError(
                f"A finished file could not be moved into place{where}: its folder lies on another disk. All of data/ "
                "must be on one filesystem, because artifacts appear by one rename: link data/ as a whole, not a "
                f"folder in it. {_WHOLE}"
            )
        case errno.ENAMETOOLONG:
            return MachineError(f"A name is longer than the filesystem takes{where}. Shorten it. {_WHOLE}")
        case errno.EIO:
            return MachineError(
                f"The disk could not read or write{where}: {os.strerror(number)}. See `dmesg`. {_WHOLE}"
            )
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
            f"The GPU's memory is too small for this run: {figures} {_WHOLE} Set per_device_train_batch_size: auto or "
            "lower it, set training_args.gradient_checkpointing: true or quantization: nf4, or take a smaller image "
            "size; in captioning, lower generation.batch_size."
        )
    asked = _ASKED_BYTES.search(said)
    wanted = f"{shown_bytes(int(asked[1]))} were asked for at once. " if asked else f"{said}. " if said else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = "" if limit == resource.RLIM_INFINITY else f", of {shown_bytes(limit)} that its limit (ulimit -v) allows"
    return (
        f"Main memory is used up. {wanted}This process held {shown_bytes(peak)} at most{limited}. {_WHOLE} Lower "
        "per_device_train_batch_size, the image size or image.max_source_pixels, or close other programs."
    )


def _free_space(path: object) -> str:
    """Free space of every disk that a run writes to, the fullest first."""
    data = Path.cwd() / "data"
    places = [Path.cwd(), *(sorted(data.glob("*/")) if data.is_dir() else []), Path(tempfile.gettempdir())]
    if isinstance(path, (str, os.PathLike)):
        places.insert(0, _existing(Path(path)))
    disks: dict[int, tuple[int, str]] = {}
    for place in places:
        facts = os.statvfs(place)
        free, size = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
        inodes = ", and no room for another file's entry" if facts.f_files and not facts.f_favail else ""
        disks.setdefault(place.stat().st_dev, (free, f"{shown_bytes(free)} of {shown_bytes(size)} in {place}{inodes}"))
    return f"Free now: {'; '.join(text for _, text in sorted(disks.values()))}."


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _ownership(path: object) -> str:
    user = f"This process runs as user {os.geteuid()}"
    if not isinstance(path, (str, os.PathLike)):
        return f"{user}."
    place = Path(path)
    try:
        while not os.path.lexists(place):
            place = place.parent
        facts = place.stat()
    except OSError:  # not even to be looked at
        return f"{user}."
    return f"{user}; {place} belongs to user {facts.st_uid} with mode {facts.st_mode & 0o777:o}."


def shown_bytes(count: float) -> str:
    """`3.1 GiB`, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
