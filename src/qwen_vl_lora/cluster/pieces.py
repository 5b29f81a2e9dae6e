"""Independent pieces of work, handed out to processes: those of one that dies are handed out again."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from qwen_vl_lora.exceptions import ClusterError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_AHEAD = 2
"""Pieces that a process has at once, so that it does not wait for the next."""
_ATTEMPTS = 3
"""Times that a piece may be lost with its process."""


class Finished(NamedTuple, Generic[Result]):
    """The result of a piece, with its number and the name of the process that did it."""

    number: int
    result: Result
    process: str


@dataclass(eq=False)
class Worker:
    """A process that does pieces.

    Attributes:
        do: begins a piece.
        lost: what a piece raises if the process has died, and `loss` what is said then.
        revive: starts it again; False if that is not possible.
    """

    name: str
    do: Callable[[Any], Future[Any]]
    lost: type[Exception]
    loss: str
    revive: Callable[[], bool] = lambda: False


def hand_out(workers: Sequence[Worker], pieces: Iterable[Any], timeout: int) -> Iterator[Finished[Any]]:
    """Yield pieces as they are finished.

    Raises:
        ClusterError: if no piece is finished for `timeout` seconds, or no process is left.
    """
    new, again = iter(enumerate(pieces)), collections.deque[tuple[int, Any]]()
    free = collections.deque([*workers] * _AHEAD)
    running: dict[Future[Any], tuple[Worker, tuple[int, Any]]] = {}
    losses = collections.Counter[int]()
    while True:
        while free and (piece := again.popleft() if again else next(new, None)) is not None:
            worker = free.popleft()
            running[worker.do(piece[1])] = worker, piece
        if not running:
            return
        done, _ = wait(running, timeout, FIRST_COMPLETED)
        if not done:
            busy = ", ".join(dict.fromkeys(worker.name for worker, _ in running.values()))
            where = f"No piece was finished for {timeout} s: {busy}"
            raise ClusterError(f"{where}. The limit is cluster.timeout; finished pieces are kept.")
        task = done.pop()
        worker, (number, _) = running[task]
        try:
            result = task.result()
        except worker.lost as error:
            lost = [running.pop(other)[1] for other, (owner, _) in [*running.items()] if owner is worker]
            again.extend(lost)
            free = collections.deque(other for other in free if other is not worker)
            logger.warning("%s. Its share is repeated: %d pieces.", worker.loss, len(lost))
            losses.update(other for other, _ in lost)
            if losses[number] >= _ATTEMPTS:
                raise ClusterError(
                    f"Processes died {_ATTEMPTS} times without finishing a piece (the kernel kills them when main "
                    "memory is used up; see `dmesg`). What is finished is kept. Lower cluster.processes, and give the "
                    "same command again."
                ) from error
            if worker.revive():
                free.extend([worker] * _AHEAD)
            elif not (free or running):
                raise ClusterError(f"{worker.loss}. It was the last process; what is finished is kept.") from error
        else:
            del running[task]
            free.append(worker)
            yield Finished(number, result, worker.name)
