"""What Python itself says it opens, imports, connects to and starts, while it is asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_EVENTS = ("open", "import", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
_watched: list[str] | None = None


def _note(event: str, arguments: tuple) -> None:
    if _watched is not None and event in _EVENTS:
        _watched.append(f"{event} {arguments[0]!r} {arguments[1:2]}")


sys.addaudithook(_note)  # for the rest of the process; it does nothing unless asked


@contextmanager
def watched() -> Iterator[list[str]]:
    """The events inside the block, as texts."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None
