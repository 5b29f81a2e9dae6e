"""The handle of a writer process: sends lines, reads answers, and bounds every wait."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 65536


class WriterProcess:
    """A tracker's writer in a process of its own.

    Args:
        program: its file; it reads and writes messages of one JSON line.

    Attributes:
        answers: its messages.
    """

    def __init__(self, program: Path, folder: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-P", str(program)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,  # Ctrl-C must reach only the run, which then reports its end
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._into, self._out_of = self._process.stdin, self._process.stdout
        os.set_blocking(self._into.fileno(), False)
        self._unsent = bytearray()
        self._heard = bytearray()
        self._is_silent = False
        self.answers: list[dict[str, Any]] = []

    @property
    def answer(self) -> dict[str, Any] | None:
        """Its last message, or None."""
        return self.answers[-1] if self.answers else None

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message as soon as the writer accepts it."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.exchange(0)

    def exchange(self, seconds: float) -> None:
        """Send and receive what is ready, waiting at most `seconds` for the first of it."""
        hears = [] if self._is_silent else [self._out_of]
        takes = [self._into] if self._unsent and not self._into.closed else []
        heard, taken, _ = select.select(hears, takes, [], seconds)
        if heard:
            self._hear()
        if taken:
            self._send()

    def _hear(self) -> None:
        said = os.read(self._out_of.fileno(), _CHUNK)
        self._is_silent = not said
        *lines, rest = (bytes(self._heard) + said).split(b"\n")
        self._heard = bytearray(rest)
        self.answers += map(json.loads, lines)

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._into.fileno(), self._unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it has ended; its answer has the reason
            self._unsent.clear()

    def wait(self, seconds: float) -> bool:
        """Send the rest and wait for its end; kill it after `seconds`. Returns whether it ended without an error."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            if not self._unsent:
                self._into.close()
            self.exchange(0.02)  # a pause if nothing is left to send or receive
        self.discard()
        return self._process.returncode == 0

    def discard(self) -> None:
        """Kill it if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._into.close()
        while not self._is_silent:
            self._hear()
        self._out_of.close()


def png_of(image: Any) -> str:
    """A picture as text of a message: a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
