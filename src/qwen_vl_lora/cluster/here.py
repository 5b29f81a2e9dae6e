"""This process as one of the ranks. A single process is rank 0 of 1 and does not wait."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_OF_A_LAUNCHER = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|FORK_LAUNCHED|"
    r"(TORCHELASTIC|PMI|PMIX|OMPI_COMM_WORLD|MV2_COMM_WORLD|MPI|ACCELERATE|PARALLELISM_CONFIG|FSDP)_\w+"
)
"""Environment variables that tell torch, accelerate and MPI about other processes and how to train."""

ignored_variables: list[str] = []
"""Names of the variables that were removed from the environment."""

asked_to_stop: signal.Signals | None = None
"""A signal that the run's own process passed on to this rank."""


def forget_other_launchers() -> None:
    """Remove the variables of other launchers from the environment: SLURM's scripts, Kubeflow, torchrun.

    With them torch, accelerate and transformers would wait for processes that do not exist, or train with other
    settings. The project's own ranks are child processes, whose variables are kept.
    """
    if multiprocessing.parent_process() is not None:
        return
    for name in sorted(filter(_OF_A_LAUNCHER.fullmatch, os.environ)):
        ignored_variables.append(name)
        del os.environ[name]


def rank() -> int:
    """The number of this process, over all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


@dataclass(frozen=True)
class Status:
    """The position of a rank's work.

    Attributes:
        where: for messages, such as `step 3 of 62`.
        waits: whether it waits for the other ranks there; a hang is then caused by another rank.
        count: changes with every step of the work.
    """

    where: str = "starting"
    waits: bool = False
    count: int = -1


_changes = itertools.count()
_status = Status()


def status() -> Status:
    """The position of this rank."""
    return _status


def note(where: str, *, waits: bool = False) -> None:
    """Set the position of this rank."""
    global _status
    _status = Status(where, waits, next(_changes))


@contextmanager
def waiting(where: str) -> Iterator[None]:
    """Context in which this rank waits for the others."""
    before = _status.where
    note(where, waits=True)
    yield
    note(before)


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


def meet(where: str) -> None:
    """Wait until every rank has called this."""
    gather([0.0], where)
