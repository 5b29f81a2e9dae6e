"""What the run's own process hears of its ranks: log records, rows, faults, and signs of life."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen_vl_lora.cluster.faults import Fault, root_of, to_error
from qwen_vl_lora.cluster.here import Status
from qwen_vl_lora.cluster.rank import Job, Message
from qwen_vl_lora.exceptions import ClusterError
from qwen_vl_lora.runs.run import RunInterruptedError

OnRow = Callable[[dict[str, Any]], None]

_SILENCE_SECONDS = 5.0
"""If no rank makes progress, a rank without a sign of life for this long is the cause."""


@dataclass
class _Seen:
    """The last status of one rank, and the times of its last sign of life and last progress."""

    status: Status
    alive_at: float
    moved_at: float


class Listener:
    """Takes the messages of all ranks, in the run's own process.

    Attributes:
        faults: what ended ranks.
    """

    def __init__(self, job: Job, on_row: OnRow | None) -> None:
        self.faults: list[Fault] = []
        self._job = job
        self._on_row = on_row
        self._seen: dict[int, _Seen] = {}

    def hear(self, rank: int, message: Message) -> None:
        """Take one message. Errors of `on_row` are raised here."""
        kind, value = message
        now = time.monotonic()
        seen = self._seen.setdefault(rank, _Seen(Status(), now, now))
        seen.alive_at = now
        if kind == "status":
            if value.count != seen.status.count:
                seen.moved_at = now
            seen.status = value
        elif kind == "fault":
            self.faults.append(value)
        elif kind == "row" and self._on_row is not None:
            self._on_row(value)
        elif kind == "log":
            logger = logging.getLogger(value.name)
            if logger.isEnabledFor(value.levelno):
                logger.handle(value)

    def check_progress(self) -> None:
        """Whether the ranks make progress.

        Raises:
            ClusterError: naming those that hang, and where.
        """
        now, timeout = time.monotonic(), self._job.timeout
        is_stuck = len(self._seen) == self._job.world_size and all(
            now - seen.moved_at > timeout for seen in self._seen.values()
        )
        patience = min(timeout, _SILENCE_SECONDS) if is_stuck else timeout
        if silent := {rank: seen for rank, seen in self._seen.items() if now - seen.alive_at > patience}:
            seconds = round(min(now - seen.alive_at for seen in silent.values()))
            why = (
                f"No sign of life for {seconds} s from {_said(silent)}: the process is stopped or its machine is gone."
            )
        elif is_stuck:
            busy = {rank: seen for rank, seen in self._seen.items() if not seen.status.waits} or self._seen
            others = " while the others wait for it" if len(busy) < len(self._seen) else ""
            why = f"No progress for {timeout} s: {_said(busy)} hangs{others}."
        else:
            return
        raise ClusterError(f"{why} The limit is cluster.timeout; checkpoints are kept.")

    def raise_fault(self, asked: signal.Signals | None) -> None:
        """Raise the error that explains why the ranks ended.

        Args:
            asked: the signal that the run got meanwhile; without a saved state it ends the run as it would by itself.
        """
        root = root_of(self.faults) if self.faults else None
        if root is not None and (asked is None or root.kind is RunInterruptedError):
            raise to_error(root, self._job.world_size)
        if asked is not None:
            signal.raise_signal(asked)
        raise ClusterError("The ranks ended without a message. See the messages above.")


def _said(seen: dict[int, _Seen]) -> str:
    return "; ".join(f"rank {rank} ({seen[rank].status.where})" for rank in sorted(seen))


@dataclass
class Signals:
    """SIGTERM, Ctrl-C and SIGHUP while ranks run: the first is kept for them, a second ends this process at once."""

    received: signal.Signals | None = None
    _previous: dict[signal.Signals, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def kept(self, passed_on: Callable[[signal.Signals], None]) -> Iterator[None]:
        """Context in which a signal is kept and passed on to the ranks."""

        def receive(number: int, _: object) -> None:
            self.received = signal.Signals(number)
            self._give_back()
            passed_on(self.received)

        for number in self._previous:
            signal.signal(number, receive)
        yield

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Context after which the handlers are as before, whoever replaced them."""
        if threading.current_thread() is threading.main_thread():
            names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
            self._previous = {number: signal.getsignal(number) for number in names}
        try:
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
