"""One rank: its surroundings, its messages to the run's own process, and its end."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from logging.handlers import QueueHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_lora.cluster import here
from qwen_vl_lora.cluster.faults import Fault

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

Message = tuple[Literal["status", "log", "row", "fault"], Any]
Send = Callable[[Message], None]

LOGS = "logs"
_LOG_BYTES = 10 * 2**20
"""A rank's log that is longer begins anew."""
_ECHO_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """What all ranks do, the same for each.

    Attributes:
        function: of a module; it gets `arguments`, and after them a receiver of rows, or None.
        device: `cpu` or `cuda`.
        threads: of each rank, for its operators.
        timeout: seconds without progress after which a rank counts as hanging.
        log_level: of the package's messages.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    tells_rows: bool
    world_size: int
    device: str
    threads: int
    timeout: int
    log_level: int


def run_rank(job: Job, rank: int, meeting: Store | str, send: Send) -> Any:
    """Do one rank's part.

    Args:
        meeting: where the ranks meet: torch's store, or `tcp://HOST:PORT`.
        send: passes a message to the run's own process; from the first rank also its log records and rows.

    Returns:
        What the function returned.
    """
    from torch import distributed

    with _speaking(rank, job.log_level, send):
        use_device(job.device, int(os.environ["LOCAL_RANK"]), job.threads)
        where: dict[str, Any] = {"init_method": meeting} if isinstance(meeting, str) else {"store": meeting}
        distributed.init_process_group(
            "nccl" if job.device == "cuda" else "gloo",
            rank=rank,
            world_size=job.world_size,
            # Longer than the limit of the run's own process, whose message names the rank.
            timeout=timedelta(seconds=1.5 * job.timeout + 30),
            **where,
        )
        here.note("reading its task")
        result = job.function(*job.arguments, functools.partial(_tell_row, send) if job.tells_rows else None)
        with here.waiting("the end"):
            distributed.barrier()
        distributed.destroy_process_group()
        return result


def use_device(device: str, number: int, threads: int) -> None:
    """Use this process's share of a machine: one GPU, or some threads. Without a device torch is not imported."""
    if not device:
        return
    import torch

    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(number)


def _tell_row(send: Send, row: Any) -> None:
    send(("row", row))


def tell_fault(rank: int, error: BaseException, send: Send) -> Fault:
    """Pass an error to the run's own process. An echo waits, so that the rank which ended first is seen first."""
    fault = Fault.of(rank, error)
    send(("fault", fault))
    if fault.is_echo:
        time.sleep(_ECHO_SECONDS)
    return fault


@contextlib.contextmanager
def _speaking(rank: int, level: int, send: Send) -> Iterator[None]:
    """The first rank passes its log records to the run; the others write everything into files of their own."""
    root, ours = logging.getLogger(), logging.getLogger("qwen_vl_lora")
    with contextlib.ExitStack() as stack:
        handler: logging.Handler
        if rank == 0:
            handler = _ToTheRun(send)
        else:
            file = Path(LOGS, f"rank-{rank}.log")
            file.parent.mkdir(exist_ok=True)
            is_long = file.is_file() and file.stat().st_size > _LOG_BYTES
            lines = stack.enter_context(file.open("w" if is_long else "a", encoding="utf-8"))
            handler = logging.StreamHandler(lines)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            stack.enter_context(contextlib.redirect_stdout(lines))
            stack.enter_context(contextlib.redirect_stderr(lines))
        logging.captureWarnings(True)
        warnings.simplefilter("default")
        levels = root.level, ours.level
        root.setLevel(level)
        ours.setLevel(level)
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            root.setLevel(levels[0])
            ours.setLevel(levels[1])
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()


class _ToTheRun(QueueHandler):
    """Passes log records on, ready to be pickled."""

    def __init__(self, send: Send) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        self._send(("log", record))
