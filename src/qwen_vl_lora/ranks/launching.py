"""Start ranks with torch's elastic launcher, wait for them, and give back what they gave.

<workspace>/launches/<id>/task.json       what is to be done: plain data, read by every rank
<workspace>/launches/<id>/result-<rank>.json, fault-<rank>.json, events.jsonl
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import DeviceError, LauncherError
from qwen_vl_lora.lineage.run import at_run_end
from qwen_vl_lora.lineage.storage import Lock, write_whole
from qwen_vl_lora.parameters import LauncherParameters
from qwen_vl_lora.ranks.board import Address, Board
from qwen_vl_lora.ranks.errors import read_faults, record_death, root_of, to_error
from qwen_vl_lora.ranks.watching import OnRow, Watch
from qwen_vl_lora.ranks.working import TASK, run_rank

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Task = dict[str, Any]
"""Plain data: what JSON can hold."""
Work = Callable[[Task], Any]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Those that torch's launcher takes over, and does not give back."""
_VERSIONS = ("torch", "transformers", "peft", "accelerate", "qwen-vl-lora")
FAREWELL_SECONDS = 5.0


def count_ranks(launcher: LauncherParameters, device: torch.device) -> int:
    """Processes over all machines that one work is shared by.

    Raises:
        DeviceError: if a machine with GPUs is asked for more processes than it has.
    """
    return launcher.nnodes * _processes_here(launcher.nproc_per_node, device.type)


def threads_of_a_rank(launcher: LauncherParameters, device: torch.device) -> int:
    """Threads that each rank computes with: on a CPU its part of what one process would take."""
    import torch

    threads = torch.get_num_threads()
    return threads if device.type == "cuda" else max(1, threads // _processes_here(launcher.nproc_per_node, "cpu"))


def _processes_here(wanted: int | str, device: str) -> int:
    import torch

    there = torch.cuda.device_count() if device == "cuda" else None
    if isinstance(wanted, str):
        return there or 1
    if there is not None and wanted > there:
        raise DeviceError(
            f"launcher.nproc_per_node is {wanted}, but this machine has {there} GPUs and each process needs its own. "
            "Give at most that many, or `auto`."
        )
    return wanted


def run_on_ranks(
    work: Work, task: Task, launcher: LauncherParameters, device: torch.device, workspace: Path, on_row: OnRow | None
) -> list[Any]:
    """Let every rank do `work(task)`.

    Args:
        work: a function of a module; each rank imports it by name.
        task: what to do, for all ranks alike.
        workspace: a folder that every machine sees.
        on_row: told what rank 0 tells by `tell_row`, from another thread.

    Returns:
        What each rank gave, in the order of ranks.

    Raises:
        QwenVLLoraError: a rank's own error, with its name before the message.
        LauncherError: if a rank was killed, hung, or ended with an error that is none of the project's.
        RunInterruptedError: on SIGTERM or Ctrl-C, when the ranks saved a checkpoint.
    """
    board = _board(launcher)
    order: dict[str, Any] = {
        "launch": uuid.uuid4().hex[:12],
        "work": f"{work.__module__}:{work.__qualname__}",
        "address": str(board.address),
        "device": device.type,
        "nnodes": launcher.nnodes,
        "nproc_per_node": _processes_here(launcher.nproc_per_node, device.type),
        "world_size": count_ranks(launcher, device),
        "threads": threads_of_a_rank(launcher, device),
        "timeout": launcher.timeout,
        "rdzv_timeout": launcher.rdzv_timeout,
        "log_level": logging.getLogger("qwen_vl_lora").getEffectiveLevel(),
        "versions": versions(),
    }
    with _launch_folder(workspace / "launches", order["launch"]) as folder:
        order["folder"] = portable(folder)
        write_whole(folder / TASK, json.dumps(task), sync=False)
        logger.info("%s runs in %d processes on %d machines.", work.__name__, order["world_size"], launcher.nnodes)
        _wait_for_machines(board, launcher)
        board.tell(f"launch/{board.count('launches', 1)}", order)
        ended = launch_here(order, board, 0, on_row)
        _raise_what_happened(ended, folder, order)
        return [_read_result(folder / f"result-{rank}.json") for rank in range(order["world_size"])]


def portable(path: Path) -> str:
    """A path as every machine finds it: below the project folder, or the same everywhere."""
    path = path.absolute()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.as_posix()


def versions() -> dict[str, str]:
    """What must be the same on every machine."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@dataclass(frozen=True)
class Ended:
    """How a launch ended on one machine."""

    failed: bool
    received: signal.Signals | None
    verdict: str | None
    row_fault: BaseException | None


def launch_here(order: dict[str, Any], board: Board, node: int, on_row: OnRow | None = None) -> Ended:
    """Start this machine's ranks and wait until all are gone."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    failed, received = False, None
    with Watch(board, order, node, on_row) as watch, _surroundings(order):
        try:
            elastic_launch(_config(order, node), run_rank)(order, node, os.getpid())
        except ChildFailedError as error:
            failed = True
            for rank, failure in error.failures.items():
                if failure.exitcode < 0:
                    record_death(Path(order["folder"]), rank, failure.signal_name())
        except SignalException as error:
            received = error.sigval
        if failed and watch.verdict is None:
            why = f"A rank of machine {node} failed."
            with contextlib.suppress(RuntimeError):  # the run's own process is gone
                board.tell(f"failed/{order['launch']}", {"node": node, "why": why})
    return Ended(failed, received, watch.verdict, watch.row_fault)


def _config(order: dict[str, Any], node: int) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    newer = {"shutdown_timeout": order["timeout"]}  # a signalled rank may take this long to save its checkpoint
    known = {field.name for field in dataclasses.fields(LaunchConfig)}
    return LaunchConfig(
        min_nodes=order["nnodes"],
        max_nodes=order["nnodes"],
        nproc_per_node=order["nproc_per_node"],
        run_id=order["launch"],
        rdzv_backend="static",
        rdzv_endpoint=order["address"],
        rdzv_configs={"rank": node, "timeout": order["rdzv_timeout"]},
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        **{name: value for name, value in newer.items() if name in known},
    )


@contextlib.contextmanager
def _surroundings(order: dict[str, Any]) -> Iterator[None]:
    """What ranks inherit, and what torch's launcher changes: put back afterwards."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS} if in_main_thread else {}
    talkers = [logging.getLogger(name) for name in ("torch.distributed.elastic", "torchelastic-events-null")]
    were_silent = [talker.disabled for talker in talkers]
    inherited = {"TORCH_CPP_LOG_LEVEL": "FATAL"}  # a lost connection prints pages; the error says it
    if order["nnodes"] == 1:
        inherited |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    added = {name: value for name, value in inherited.items() if name not in os.environ}
    os.environ.update(added)
    for talker in talkers:
        talker.disabled = True
    try:
        yield
    finally:
        for talker, was_silent in zip(talkers, were_silent, strict=True):
            talker.disabled = was_silent
        for name in added:
            del os.environ[name]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _raise_what_happened(ended: Ended, folder: Path, order: dict[str, Any]) -> None:
    if ended.row_fault is not None:
        raise ended.row_fault
    if not ended.failed and ended.received is None and ended.verdict is None:
        return
    until = time.monotonic() + (FAREWELL_SECONDS if order["nnodes"] > 1 else 0)
    while (faults := read_faults(folder)) == [] or all(fault.is_echo for fault in faults):
        if time.monotonic() > until:  # other machines tell by the shared folder
            break
        time.sleep(0.2)
    told = [fault for fault in faults if fault.kind != "signal"] if ended.verdict else faults
    root = root_of(told) if told else None
    if ended.verdict is not None and (root is None or root.is_echo):
        raise LauncherError(f"{ended.verdict} Its limit is launcher.timeout; checkpoints stay.")
    if root is not None and (ended.received is None or root.kind == "RunInterruptedError"):
        raise to_error(root, order["world_size"])
    if ended.received is not None:
        signal.raise_signal(ended.received)  # as if no launch had been under way
    raise LauncherError("The ranks ended without a word. See the messages above.")


def _read_result(file: Path) -> Any:
    until = time.monotonic() + FAREWELL_SECONDS
    while not file.is_file() and time.monotonic() < until:  # a network folder may lag behind
        time.sleep(0.2)
    return json.loads(file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _launch_folder(root: Path, name: str) -> Iterator[Path]:
    """A folder for one launch; those that killed launches left are removed."""
    root.mkdir(parents=True, exist_ok=True)
    for old in root.iterdir():
        if not old.name.startswith(".") and not Lock.is_held(old / ".lock"):
            shutil.rmtree(old, ignore_errors=True)
    making, folder = root / f".{name}", root / name
    lock = Lock(making / ".lock")
    lock.acquire()
    making.rename(folder)
    try:
        yield folder
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


_held: dict[str, Board] = {}
"""The store of a run over several machines: one for all its launches, so that the others stay with it."""


def _board(launcher: LauncherParameters) -> Board:
    if launcher.nnodes == 1 or launcher.rdzv_endpoint is None:
        return Board.hold()
    if launcher.rdzv_endpoint not in _held:
        _held[launcher.rdzv_endpoint] = Board.hold(Address.parse(launcher.rdzv_endpoint))
        at_run_end(lambda finished: _dismiss(launcher, finished))
    return _held[launcher.rdzv_endpoint]


def _dismiss(launcher: LauncherParameters, finished: bool) -> None:
    """Tell the other machines that the run is over, and stay until they have heard it."""
    board = _held.pop(str(launcher.rdzv_endpoint))
    board.tell("ended", finished)
    until = time.monotonic() + FAREWELL_SECONDS
    while board.count("left") < board.count("machines") and time.monotonic() < until:
        time.sleep(0.1)


def _wait_for_machines(board: Board, launcher: LauncherParameters) -> None:
    others = launcher.nnodes - 1
    if board.count("machines") < others:
        logger.info("Waiting for %d more machines: qwen-vl-lora worker --rendezvous %s", others, board.address)
    until = time.monotonic() + launcher.rdzv_timeout
    while (came := board.count("machines")) < others:
        if time.monotonic() > until:
            raise LauncherError(
                f"launcher.nnodes is {launcher.nnodes}, but only {came} of {others} further machines came within "
                f"launcher.rdzv_timeout {launcher.rdzv_timeout} s. Start on each: qwen-vl-lora worker --rendezvous "
                f"{board.address}."
            )
        time.sleep(0.25)
