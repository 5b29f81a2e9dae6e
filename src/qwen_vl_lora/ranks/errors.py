"""How a fault in one rank reaches the run: with its own class and message, and the rank's name."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_vl_lora.exceptions import LauncherError, QwenVLLoraError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.lineage.run import RunInterruptedError
from qwen_vl_lora.lineage.storage import write_whole

_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Connection was likely closed")


@dataclass(frozen=True)
class Fault:
    """What ended a rank.

    Attributes:
        kind: class of the error; `signal` where the process was killed.
        module: of the class.
        is_expected: whether it is one of the project's own errors, whose message is for people.
        is_echo: whether it only says that another rank went away.
        at: seconds since the epoch.
    """

    rank: int
    kind: str
    module: str
    message: str
    trace: str
    is_expected: bool
    is_echo: bool
    at: float


class RankTracebackError(Exception):
    """The traceback of another process, as the cause of the error that is raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def record_fault(folder: Path, rank: int, error: BaseException) -> Fault:
    """Leave an error for the run's own process."""
    from torch.distributed import DistError

    known = error if isinstance(error, QwenVLLoraError) else machine_fault(error)
    told = known or error
    fault = Fault(
        rank=rank,
        kind=type(told).__name__,
        module=type(told).__module__,
        message=str(told),
        trace="".join(traceback.format_exception(error)),
        is_expected=known is not None,
        is_echo=isinstance(error, DistError) or any(sign in str(error) for sign in _PEER_GONE),
        at=time.time(),
    )
    _write(folder, fault)
    return fault


def record_death(folder: Path, rank: int, signal_name: str) -> None:
    """Leave a note of a rank that was killed and could not say so itself."""
    message = f"was killed by {signal_name}"
    if signal_name == "SIGKILL":
        message += " (the kernel does that when main memory is used up; `dmesg` says)"
    _write(folder, Fault(rank, "signal", "", message, "", is_expected=False, is_echo=False, at=time.time()))


def _write(folder: Path, fault: Fault) -> None:
    file = folder / f"fault-{fault.rank}.json"
    if not file.exists():
        write_whole(file, json.dumps(asdict(fault)), sync=False)


def read_faults(folder: Path) -> list[Fault]:
    """All that was left, earliest first."""
    faults = [Fault(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("fault-*.json")]
    return sorted(faults, key=lambda fault: fault.at)


def root_of(faults: Sequence[Fault]) -> Fault:
    """The fault that the others follow from."""

    def weight(fault: Fault) -> tuple[int, float]:
        if fault.kind == RunInterruptedError.__name__:
            return 0, fault.rank
        return (1 if fault.is_expected else 3 if fault.is_echo else 2), fault.at

    return min(faults, key=weight)


def to_error(fault: Fault, world_size: int) -> QwenVLLoraError:
    """The rank's error as the run raises it; its traceback is the cause."""
    where = f"Rank {fault.rank} of {world_size}"
    error: QwenVLLoraError
    if fault.kind == RunInterruptedError.__name__:
        error = RunInterruptedError(fault.message)
    elif fault.is_expected:
        error = _class_named(fault)(f"{where}: {fault.message}")
    elif fault.kind == "signal":
        error = LauncherError(f"{where} {fault.message}. What was saved stays; the same command goes on from there.")
    elif fault.is_echo:
        error = LauncherError(
            f"{where} lost its connection to another rank, which ended without a word: it was killed, or its machine "
            "is gone. The same command goes on from the last checkpoint."
        )
    else:
        error = LauncherError(f"{where} ended with {fault.kind}: {fault.message}")
    if fault.trace:
        error.__cause__ = RankTracebackError(fault.trace)
    return error


def _class_named(fault: Fault) -> type[QwenVLLoraError]:
    importlib.import_module(fault.module)
    known = {(found.__module__, found.__name__): found for found in _below(QwenVLLoraError)}
    return known[fault.module, fault.kind]


def _below(parent: type[QwenVLLoraError]) -> Iterator[type[QwenVLLoraError]]:
    for child in parent.__subclasses__():
        yield child
        yield from _below(child)
