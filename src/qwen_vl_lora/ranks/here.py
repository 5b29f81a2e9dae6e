"""What a process knows of itself among the ranks. Where it is alone, it is rank 0 of 1 and waits for nobody."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


def rank() -> int:
    """This process, counted over all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def is_first_on_a_further_machine() -> bool:
    """Whether this process is the one that checks what its machine sees for the first time."""
    return os.environ.get("GROUP_RANK", "0") != "0" and os.environ.get("LOCAL_RANK") == "0"


@dataclass
class Status:
    """Where this rank's main thread is; another thread tells it to whoever watches.

    Attributes:
        where: for people, such as `step 3 of 62`.
        waits: whether it waits for the other ranks there, so that a hang is not its own.
    """

    where: str = "starting"
    waits: bool = False
    _changes: Iterator[int] = field(default_factory=itertools.count)
    count: int = 0

    def change(self, where: str, waits: bool) -> None:
        self.where, self.waits, self.count = where, waits, next(self._changes)


status = Status()


def note(where: str) -> None:
    """Say where this rank is."""
    status.change(where, waits=False)


@contextmanager
def waiting(where: str) -> Iterator[None]:
    """While entered, this rank waits for the others."""
    before = status.where
    status.change(where, waits=True)
    yield
    status.change(before, waits=False)


def gather(numbers: Sequence[float], where: str) -> list[list[float]]:
    """Every rank's numbers, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [list(numbers)]
    import torch
    from torch import distributed

    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    with waiting(where):
        distributed.all_gather(everyones, mine)
        return [theirs.tolist() for theirs in everyones]


def gather_texts(texts: Mapping[int, str], where: str) -> dict[int, str]:
    """Texts by number, of all ranks together, on every rank."""
    if world_size() == 1:
        return dict(texts)
    from torch import distributed

    everyones: list[Any] = [None] * world_size()
    with waiting(where):
        distributed.all_gather_object(everyones, dict(texts))
    return {number: text for theirs in everyones for number, text in theirs.items()}


def meet(where: str) -> None:
    """Wait until every rank is here."""
    gather([0.0], where)


def share(total: int) -> range:
    """Which of `total` pieces are this rank's: every n-th."""
    return range(rank(), total, world_size())
