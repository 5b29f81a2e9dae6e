"""The life of one rank: started by torch's launcher, told what to do by plain data, gone when the run is gone."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from qwen_vl_lora.exceptions import LauncherError
from qwen_vl_lora.lineage.storage import write_whole
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.board import Address, Board
from qwen_vl_lora.ranks.errors import record_fault

EVENTS = "events.jsonl"
TASK = "task.json"
BEAT_SECONDS = 0.5
_ECHO_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def run_rank(order: dict[str, Any], node: int, launcher: int) -> None:
    """Do this rank's share of the ordered work. Never returns with an error: it is left in the folder instead.

    Args:
        order: what `Launch` ordered; the same for every rank.
        node: this machine; 0 is that of the run.
        launcher: id of the process that started this one; 1 in a container.
    """
    _die_with(launcher)
    os.setsid()  # Ctrl-C reaches the launcher alone, which passes it on once
    folder = Path(order["folder"])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_speaking(folder / EVENTS, order["log_level"]))
            _tell_status(order, node)
            result = _work(order, node, folder)
            write_whole(folder / f"result-{here.rank()}.json", json.dumps(result), sync=False)
            _leave_together()
        except BaseException as error:
            _leave(folder, error)


def _work(order: dict[str, Any], node: int, folder: Path) -> Any:
    import torch
    from torch import distributed

    board = Board.join(Address.parse(order["address"]))
    torch.set_num_threads(order["threads"])
    if order["device"] == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "nccl" if order["device"] == "cuda" else "gloo",
        store=board.part(f"ranks/{order['launch']}"),
        rank=here.rank(),
        world_size=here.world_size(),
        timeout=timedelta(seconds=1.5 * order["timeout"] + 30),  # whoever watches is to speak first: it knows who hangs
    )
    here.note("reading its task")
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    return _find_work(order["work"], node)(task)


def _find_work(name: str, node: int) -> Callable[[dict[str, Any]], Any]:
    """The function `module:name`; a machine that hears of it over the network takes only this package's own."""
    module, _, function = name.partition(":")
    if node != 0 and not module.startswith("qwen_vl_lora."):
        raise LauncherError(f"The run asks for {name}, which is none of this package's own functions.")
    found: Callable[[dict[str, Any]], Any] = getattr(importlib.import_module(module), function)
    return found


def _leave_together() -> None:
    from torch import distributed

    with here.waiting("the end"):
        distributed.barrier()
    distributed.destroy_process_group()


def _leave(folder: Path, error: BaseException) -> NoReturn:
    """At once: clean-up of a broken process group may hang."""
    fault = record_fault(folder, here.rank(), error)
    if fault.is_echo:
        time.sleep(_ECHO_SECONDS)  # whoever watches is to see the rank that went first
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)


def _die_with(launcher: int) -> None:
    """Ask Linux to kill this process when the launcher dies, however it dies."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the store's end tells it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before
        os._exit(1)


def _tell_status(order: dict[str, Any], node: int) -> None:
    """Tell, from a thread, that this process lives and where its main thread is. Ends the process with the run's."""

    def tell() -> None:
        try:
            board = Board.join(Address.parse(order["address"]))
            beat = 0
            while True:
                beat += 1
                told = {"beat": beat, "pid": os.getpid(), "node": node}
                status = {"where": here.status.where, "waits": here.status.waits, "count": here.status.count}
                board.tell(f"status/{order['launch']}/{here.rank()}", {**told, **status})
                time.sleep(BEAT_SECONDS)
        except Exception:  # whatever it is, nobody watches this rank any more
            os._exit(1)

    threading.Thread(target=tell, name="status", daemon=True).start()


@contextlib.contextmanager
def _speaking(events: Path, level: int) -> Iterator[None]:
    """Rank 0 tells the run what it logs; the others are silent."""
    root = logging.getLogger()
    if not here.is_first():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")  # read when it comes in
        yield
        return
    with events.open("a", encoding="utf-8") as lines:
        handler = _ToEvents(lines)
        root.addHandler(handler)
        root.setLevel(level)
        logging.getLogger("qwen_vl_lora").setLevel(level)
        global _events
        _events = handler
        yield


class _ToEvents(logging.Handler):
    """Writes log records as JSON lines."""

    def __init__(self, lines: Any) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        fields = ("name", "levelno", "levelname", "pathname", "filename", "module", "lineno", "funcName", "created")
        self.tell({"log": {**{name: getattr(record, name) for name in fields}, "msg": self.format(record)}})

    def tell(self, event: dict[str, Any]) -> None:
        with self.lock or contextlib.nullcontext():
            self._lines.write(json.dumps(event) + "\n")
            self._lines.flush()


_events: _ToEvents | None = None


def tell_row(row: dict[str, Any]) -> None:
    """From rank 0: a row for whoever listens to the run."""
    assert _events is not None
    _events.tell({"row": row})
