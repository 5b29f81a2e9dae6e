"""The error of a rank, as the run's own process raises it: with its class, its message and the rank's number."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_lora.exceptions import ClusterError, QwenVLLoraError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.runs.run import RunInterruptedError

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Connection was likely closed")


@dataclass(frozen=True)
class Fault:
    """What ended a rank. It can be pickled whatever the error holds.

    Attributes:
        kind: the project's own class of the error; None if it was not expected.
        message: for users; with the class before it if the error was not expected.
        trace: traceback as text; empty if the process was killed.
        is_echo: whether it only reports a lost connection to another rank.
        at: seconds since the epoch.
        exit_code: of the run that ends with it.
    """

    rank: int
    kind: type[QwenVLLoraError] | None
    message: str
    trace: str
    is_echo: bool
    at: float
    exit_code: int = 1

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Fault:
        from torch.distributed import DistError

        known = error if isinstance(error, QwenVLLoraError) else machine_fault(error)
        return cls(
            rank=rank,
            kind=type(known) if known else None,
            message=str(known) if known else f"ended with {type(error).__name__}: {error}",
            trace="".join(traceback.format_exception(error)),
            is_echo=isinstance(error, DistError) or any(sign in str(error) for sign in _PEER_GONE),
            at=time.time(),
            exit_code=known.exit_code if known else 1,
        )

    @classmethod
    def of_death(cls, rank: int, cause: str) -> Fault:
        """A rank that ended without a message."""
        return cls(rank, None, cause, "", is_echo=False, at=time.time())


class RankTracebackError(Exception):
    """The traceback of another process, used as the cause of the error that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def killed_by(signal_name: str) -> str:
    """The message of a process that a signal ended."""
    reason = " (the kernel does this when main memory is used up; see `dmesg`)" if signal_name == "SIGKILL" else ""
    return f"was killed by {signal_name}{reason}. What was saved is kept; the same command resumes from there."


def root_of(faults: Sequence[Fault]) -> Fault:
    """The most likely cause of all faults."""

    def weight(fault: Fault) -> tuple[int, float]:
        if fault.kind is RunInterruptedError:
            return 0, fault.rank
        return (1 if fault.kind else 3 if fault.is_echo else 2), fault.at

    return min(faults, key=weight)


def to_error(fault: Fault, world_size: int) -> QwenVLLoraError:
    """The error that the run raises for a rank's fault. The rank's traceback is its cause."""
    where = f"Rank {fault.rank} of {world_size}"
    error: QwenVLLoraError
    if fault.kind is RunInterruptedError:
        error = RunInterruptedError(fault.message)
        error.exit_code = fault.exit_code
    elif fault.kind is not None:
        error = fault.kind(f"{where}: {fault.message}")
    elif fault.is_echo:
        error = ClusterError(
            f"{where} lost its connection to another rank, which ended without a message: it was killed, or its "
            "machine is gone. The same command resumes from the last checkpoint."
        )
    else:
        error = ClusterError(f"{where} {fault.message}")
    if fault.trace:
        error.__cause__ = RankTracebackError(fault.trace)
    return error
