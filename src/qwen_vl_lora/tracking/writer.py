"""What the processes that write a tracker's run share: messages of one JSON line each, in and out.

Imported by files that are started on their own, so it imports nothing of this project.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def take_output() -> TextIO:
    """Reserve standard output for messages, and discard what the tracker's client prints."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return answers


def answer(answers: TextIO, **facts: Any) -> None:
    """Send one message to the run, which may have ended."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(facts), file=answers, flush=True)


def told(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def messages() -> Iterator[dict[str, Any]]:
    """Yield the messages of the run until it closes the pipe."""
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # incomplete, if the sender was killed while writing it
            yield json.loads(line)
