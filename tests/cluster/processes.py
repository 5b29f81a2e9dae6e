"""Which processes a test started, also those that left its process group or lost their parent."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

MARK = "QWEN_VL_LORA_TEST"


@contextlib.contextmanager
def marked():
    """Everything that is started meanwhile carries a mark. Gives the mark."""
    mark = uuid.uuid4().hex
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield mark
    finally:
        if before is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = before


def living(mark: str) -> dict[int, str]:
    """Command lines of the processes with the mark, by process id; this process and dead ones are left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                stays = int(parent) == os.getpid() and "resource_tracker" in line  # Python keeps one for its lifetime
                if state != "Z" and int(folder.name) != os.getpid() and not stays:
                    found[int(folder.name)] = line
    return found


def wait_until(condition, seconds=60.0):
    """Whether the condition came true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.1)
    return False
