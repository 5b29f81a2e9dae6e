"""Files and folders that are complete or absent, even after power loss; hashes; locks that end with their process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path

_ENDINGS = frozenset({".partial", ".retired"})
_WITH_PROCESS_ID = re.compile(r"\.(key\.json|[0-9a-f]{64}(\.[a-z]+)?)\.\d+")


def temporary(path: Path) -> Path:
    """Return a hidden name beside `path` for an unfinished file. Every temporary name has this form.

    `leftovers` finds what a killed process leaves under such a name, and `qwen-vl-lora prune` lists it.
    """
    return path.with_name(temporary_name(path.name))


def temporary_name(name: str, ending: str = "partial") -> str:
    """Return the same as text, for code that makes thousands."""
    return f".{name}.{uuid.uuid4().hex}.{ending}"


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder` to the disk, so that a later rename survives power loss."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            sync_file(path)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Flush all files in `folder` to the disk, with one call for thousands of small files where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_filesystem = getattr(ctypes.CDLL(None), "syncfs", None)
        if sync_filesystem is None or sync_filesystem(descriptor) != 0:
            sync_tree(folder)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text file under a temporary name and rename it: a reader sees the complete old or new file.

    Args:
        sync: also wait until the rename survives power loss.
    """
    partial = temporary(path)
    try:
        partial.write_text(text, encoding="utf-8")
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that a new folder and its files survive power loss."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def move(source: Path, target: Path) -> None:
    """Move a file, or a directory to where none is. On another filesystem, too, it appears whole by a rename."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = temporary(target)
        shutil.move(source, partial)
        partial.replace(target)


def replace(source: Path, target: Path) -> None:
    """Replace a file or directory with another on the same filesystem."""
    make_folder(target.parent)
    if not (source.is_dir() and target.exists()):
        source.replace(target)
    elif _exchange(source, target):
        shutil.rmtree(source, ignore_errors=True)
    else:
        retired = _hidden_beside(target)
        target.rename(retired)
        source.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    sync_folder(target.parent)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two directories atomically; False if the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def discard(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill never leaves half of it in place."""
    if path.exists():
        retired = _hidden_beside(path)
        path.rename(retired)
        shutil.rmtree(retired, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """Return what killed saves and removals left in `folder`: hidden `.partial` and `.retired` entries.

    Earlier versions of this project ended some temporary names with a process id.
    """
    found = [path for path in folder.glob(".*") if path.suffix in _ENDINGS or _WITH_PROCESS_ID.fullmatch(path.name)]
    return sorted(found)


def _hidden_beside(path: Path) -> Path:
    return path.with_name(temporary_name(path.name, "retired"))


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(path: Path) -> dict[str, str]:
    """Return relative name → hex sha256 of every file below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


def size(path: Path) -> int:
    """Return the size in bytes of a file, or of everything below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


class Lock:
    """An advisory lock on a file, held until `release` or until the process ends for any reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False if it is held elsewhere, also within this process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock. The file is kept, because removing it would race with the next process that opens it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a running process holds the lock."""
        if not path.is_file():
            return False
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
