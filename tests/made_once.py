"""What costs something and is the same for all tests is made by one test process, for all of them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this name, made by whoever comes first. Read-only: copy it.

    Args:
        root: pytest's base temporary folder; processes of pytest-xdist have theirs side by side.
        make: writes the folder at the path it gets, which is not the final one.
    """
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = shared / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
    return folder
