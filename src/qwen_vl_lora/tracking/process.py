"""The handle on a writer: tells it lines, hears its answers, and never waits longer than asked to."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_vl_lora.tracking import writer

_CHUNK = 65536


class WriterProcess:
    """A writer in a process of its own.

    Attributes:
        answers: what it said so far.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-P", str(Path(writer.__file__))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,  # a Ctrl-C is for the run, which then says how it ended
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._into, self._out_of = self._process.stdin, self._process.stdout
        os.set_blocking(self._into.fileno(), False)
        self._unsent = bytearray()
        self._heard = bytearray()
        self._is_silent = False
        self.answers: list[dict[str, Any]] = []

    def tell(self, message: Mapping[str, Any]) -> None:
        """Pass a message on as soon as the writer takes it."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.exchange(0)

    def exchange(self, seconds: float) -> None:
        """Send and hear what can be, waiting at most so long for the first of it."""
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
        self.answers += [json.loads(line) for line in lines]

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._into.fileno(), self._unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it has ended; its answer says why
            self._unsent.clear()

    def wait(self, seconds: float) -> bool:
        """Let it take what is left and end; it is killed after so long. Whether it ended by itself and well."""
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            if not self._unsent:
                self._into.close()
            if self._is_silent and self._into.closed:
                time.sleep(0.02)
            else:
                self.exchange(0.05)
        self.discard()
        return self._process.returncode == 0

    def discard(self) -> None:
        """End it now, if it has not ended by itself."""
        self._process.kill()
        self._process.wait()
        self._into.close()
        while not self._is_silent:
            self._hear()
        self._out_of.close()
