"""While a launch blocks: pass on what rank 0 says, and end ranks that hang, with their name."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.ranks.board import Board
from qwen_vl_lora.ranks.working import EVENTS

Row = dict[str, Any]
OnRow = Callable[[Row], None]

_INTERVAL = 0.25
_SILENCE_SECONDS = 5.0
"""Where nobody gets on, one that has been silent for this long is the cause."""


@dataclass
class _Seen:
    """The last that was heard of one rank, and when it last beat and last got on."""

    told: dict[str, Any]
    alive_at: float
    moved_at: float


class Watch:
    """A thread beside a launch, on the machine of the run (node 0) and on every further one.

    Attributes:
        verdict: why the ranks of this machine were ended from here; None if they were not.
    """

    def __init__(self, board: Board, order: dict[str, Any], node: int, on_row: OnRow | None = None) -> None:
        self.verdict: str | None = None
        self.row_fault: BaseException | None = None
        self._board = board
        self._order = order
        self._node = node
        self._on_row = on_row
        self._events = _EventReader(Path(order["folder"]) / EVENTS)
        self._seen: dict[int, _Seen] = {}
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._node == 0:
            self._pass_on()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL):
            if self._node == 0:
                self._pass_on()
            try:
                self._look()
            except Exception:  # the store is gone, and with it the run
                self._end("The run's own process is gone.")
                return

    def _pass_on(self) -> None:
        for event in self._events.read():
            if "log" in event:
                record = logging.makeLogRecord(event["log"])
                logger = logging.getLogger(record.name)
                if logger.isEnabledFor(record.levelno):
                    logger.handle(record)
            elif self._on_row is not None and self.row_fault is None:
                try:
                    self._on_row(event["row"])
                except BaseException as error:
                    self.row_fault = error
                    self._end("Whoever is told the log's rows refused one.")

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self._order["world_size"]):
            told = self._board.hear(f"status/{self._order['launch']}/{rank}")
            if told is not None:
                self._take(rank, told, now)
        if self.verdict is not None:
            return
        elsewhere = self._board.hear(f"failed/{self._order['launch']}")
        if elsewhere is not None and elsewhere["node"] != self._node:
            self._end(elsewhere["why"])
        elif self._node == 0 and (hang := self._hang(now)):
            self._board.tell(f"failed/{self._order['launch']}", {"node": 0, "why": hang})
            self._end(hang)

    def _take(self, rank: int, told: dict[str, Any], now: float) -> None:
        seen = self._seen.setdefault(rank, _Seen(told, now, now))
        if told["beat"] != seen.told["beat"]:
            seen.alive_at = now
        if told["count"] != seen.told["count"]:
            seen.moved_at = now
        seen.told = told

    def _hang(self, now: float) -> str | None:
        """What to say of ranks that hang, or None."""
        timeout = self._order["timeout"]
        stuck = len(self._seen) == self._order["world_size"] and all(
            now - seen.moved_at > timeout for seen in self._seen.values()
        )
        patience = min(timeout, _SILENCE_SECONDS) if stuck else timeout
        if silent := {rank: seen for rank, seen in self._seen.items() if now - seen.alive_at > patience}:
            said = "; ".join(f"rank {rank} ({seen.told['where']})" for rank, seen in sorted(silent.items()))
            seconds = round(min(now - seen.alive_at for seen in silent.values()))
            return f"No sign of life for {seconds} s from {said}: the process is stopped or its machine is gone."
        if not stuck:
            return None
        busy = {rank: seen for rank, seen in self._seen.items() if not seen.told["waits"]} or self._seen
        said = "; ".join(f"rank {rank} ({seen.told['where']})" for rank, seen in sorted(busy.items()))
        others = " while the others wait for it" if len(busy) < len(self._seen) else ""
        return f"No progress for {timeout} s: {said} hangs{others}."

    def _end(self, why: str) -> None:
        """Kill the ranks of this machine; the launcher then ends by itself."""
        self.verdict = why
        for seen in self._seen.values():
            if seen.told["node"] == self._node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(seen.told["pid"], signal.SIGKILL)


class _EventReader:
    """Whole new lines of a growing file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._place = 0

    def read(self) -> list[dict[str, Any]]:
        if not self._file.is_file():
            return []
        with self._file.open("rb") as file:
            file.seek(self._place)
            whole = file.read().rpartition(b"\n")[0]
        self._place += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]
