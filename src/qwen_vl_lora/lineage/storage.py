"""Files and folders that are whole or absent, even after power loss; hashes; locks that die with their process."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import uuid
from pathlib import Path


def sync_tree(folder: Path) -> None:
    """Bring every file below `folder` to the disk, so that a rename after it survives power loss."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            sync_file(path)
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync_folder(path)


def sync_file(path: Path) -> None:
    """Bring a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Bring all files in `folder` to the disk, thousands of small ones with one wait where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_filesystem = getattr(ctypes.CDLL(None), "syncfs", None)
        if sync_filesystem is None or sync_filesystem(descriptor) != 0:
            sync_tree(folder)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a text file beside its place and rename it there: a reader sees the old or the new one, whole.

    Args:
        sync: also wait until power loss cannot bring the old one back.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that power loss does not take a new one with what was saved in it."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def replace(source: Path, target: Path) -> None:
    """Put a file or directory in the place of another, on the same filesystem."""
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
    """Swap two directories in one step; False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(two), exchange) == 0


def discard(path: Path) -> None:
    """Remove a folder: out of sight by one rename, so that a kill never leaves half of it in its place."""
    if path.exists():
        retired = _hidden_beside(path)
        path.rename(retired)
        shutil.rmtree(retired, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """What killed saves and removals left in `folder`: hidden `.partial` and `.retired` entries."""
    return sorted(path for path in folder.glob(".*") if path.suffix in {".partial", ".retired"})


def _hidden_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.retired")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(path: Path) -> dict[str, str]:
    """Relative name → hex sha256 of every file below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file_sha256(file) for file in files}


def size(path: Path) -> int:
    """Bytes of a file, or of everything below a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


class Lock:
    """An advisory lock on a file, held until `release` or the end of the process, however that comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; False when somebody else, in this process too, holds it."""
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
        """Give the lock back. Its file stays: removing it would race with whoever opens it next."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a live process holds the lock."""
        if not path.is_file():
            return False
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
