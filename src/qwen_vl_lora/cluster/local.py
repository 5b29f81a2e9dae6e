"""Processes on this machine. Nothing but the loopback interface listens, and all of them end with this process."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qwen_vl_lora.cluster import here
from qwen_vl_lora.cluster.faults import Fault, killed_by
from qwen_vl_lora.cluster.listening import Listener, Signals
from qwen_vl_lora.cluster.pieces import Worker
from qwen_vl_lora.cluster.rank import Job, Message, run_rank, tell_fault, use_device

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 0.5
_START_METHOD = "spawn"
_PR_SET_PDEATHSIG = 1


def run_ranks(job: Job, listener: Listener) -> list[Any]:
    """Run the job in as many processes as it has ranks. Errors are those of `Processes.on_ranks`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    context = multiprocessing.get_context(_START_METHOD)
    pipes = [context.Pipe(duplex=False) for _ in range(job.world_size)]
    signals = Signals()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _surroundings(), signals.restored():
        ranks = start_processes(
            "ranks",
            _enter,
            args={rank: (job, rank, sender, os.getpid(), folder) for rank, (_, sender) in enumerate(pipes)},
            envs={rank: _environment(rank, job.world_size) for rank in range(job.world_size)},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            start_method=_START_METHOD,
        )
        for _, sender in pipes:
            sender.close()
        receivers = [receiver for receiver, _ in pipes]
        try:
            with signals.kept(lambda number: _send_signal(ranks.pids().values(), number)):
                while (ended := ranks.wait(0)) is None:
                    _hear(receivers, listener, 0.2)
                    listener.check_progress()
            _hear(receivers, listener, 0)
            if not ended.is_failed() and signals.received is None:
                return [ended.return_values[rank] for rank in range(job.world_size)]
            for rank, failure in ended.failures.items():
                if failure.exitcode < 0:
                    listener.faults.append(Fault.of_death(rank, killed_by(signal.Signals(-failure.exitcode).name)))
        finally:
            ranks.close(signal.SIGKILL)
    listener.raise_fault(signals.received)
    raise AssertionError("unreachable")


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """What torch and accelerate read. Nothing listens at this address: the ranks meet in a file."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Set what ranks inherit, and silence torch's launcher, whose errors are reported in our own words."""
    talker = logging.getLogger("torch.distributed.elastic")
    was_silent, talker.disabled = talker.disabled, True
    children = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(talker.name)]
    were_silent = [child.disabled for child in children]
    inherited = {
        "TORCH_CPP_LOG_LEVEL": "FATAL",  # a lost connection would print pages; the error message is enough
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    added = {name: value for name, value in inherited.items() if name not in os.environ}
    os.environ.update(added)
    for child in children:
        child.disabled = True
    try:
        yield
    finally:
        for child, silent in zip(children, were_silent, strict=True):
            child.disabled = silent
        talker.disabled = was_silent
        for name in added:
            del os.environ[name]


def _hear(receivers: list[Connection], listener: Listener, seconds: float) -> None:
    """Take the messages that have come, waiting at most so long for the first."""
    for ready in multiprocessing.connection.wait(receivers, seconds):
        assert isinstance(ready, Connection)
        with contextlib.suppress(EOFError, OSError):  # this rank has ended
            while ready.poll():
                listener.hear(receivers.index(ready), ready.recv())


def _send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _enter(job: Job, rank: int, sender: Connection, parent: int, folder: str) -> Any:
    """The life of a rank. After an error the process exits at once: cleaning up a broken process group may hang."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    _end_with(parent)
    lock = threading.Lock()

    def send(message: Message) -> None:
        with lock, contextlib.suppress(OSError):  # the run's own process has ended, and this one will
            sender.send(message)

    def tell_status() -> None:
        while True:
            send(("status", here.status()))
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=tell_status, name="status", daemon=True).start()
    try:
        return run_rank(job, rank, FileStore(str(Path(folder, "meeting")), job.world_size), send)
    except BaseException as error:
        tell_fault(rank, error, send)
        os._exit(1)


def _end_with(parent: int) -> None:
    """Leave the terminal's process group, and ask Linux to kill this process when its parent ends in any way."""
    os.setsid()  # Ctrl-C reaches only the run's own process, which passes it on once
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before this call
        os._exit(1)


# Pieces


@contextlib.contextmanager
def workers(work: Callable[[Any], Any], processes: int, device: str, threads: int) -> Iterator[list[Worker]]:
    """Context with processes for `pieces.hand_out`. On an error none of them is waited for."""
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context(_START_METHOD)
    pools: dict[int, ProcessPoolExecutor] = {}

    def start(number: int) -> bool:
        pools[number] = ProcessPoolExecutor(1, context, _begin, (work, device, threads, number, os.getpid()))
        return True

    def worker(number: int) -> Worker:
        start(number)
        return Worker(
            f"process {number}",
            lambda piece: pools[number].submit(_do, piece),
            BrokenProcessPool,
            "A process was killed",
            lambda: start(number),
        )

    try:
        yield [worker(number) for number in range(processes)]
        for pool in pools.values():
            pool.shutdown()
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any], device: str, threads: int, number: int, parent: int) -> None:
    """Prepare a process."""
    global _work
    _end_with(parent)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")  # read at import
    logging.disable(logging.WARNING)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")
    use_device(device, number, threads)
    _work = work


def _do(piece: Any) -> Any:
    return _work(piece)
