"""What the ranks of a test do; each rank imports it by name."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.working import tell_row


def tell_who(task):
    """Everything that a rank can say, for one launch."""
    logging.getLogger("qwen_vl_lora.work").info("rank %d speaks", here.rank())
    warnings.warn(f"rank {here.rank()} warns", stacklevel=1)
    if here.is_first():
        for step in range(3):
            tell_row({"step": step})
    numbers = here.gather([here.rank(), 0.1], "numbers")
    texts = here.gather_texts({here.rank(): f"text {here.rank()}"}, "texts")
    share = list(here.share(task["pieces"]))
    return {"rank": here.rank(), "numbers": numbers, "texts": texts[1 - here.rank()], "share": share}


def fail(task):
    """Rank 1 fails as it is told to; rank 0 waits for it."""
    here.note("step 3")
    if here.rank() == 1:
        FAULTS[task["fault"]]()
    here.meet("step 3: counting")


def _stop():
    time.sleep(2)  # so that its last sign of life says where it is
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(error):
    raise error


FAULTS = {
    "expected": lambda: _raise(DataFormatError("Picture 7 is bad. Take another.")),
    "program": lambda: {}["nothing"],
    "disk": lambda: _raise(OSError(28, "No space left on device", "data/x")),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "busy": lambda: time.sleep(600),
    "stopped": _stop,
}


def wait(task):
    """Say that all are there, and wait for a signal."""
    here.meet("start")
    if here.is_first():
        Path(task["sign"]).touch()
    time.sleep(600)


def launch(folder: Path, work, task, timeout=60, on_row=None):
    """Two ranks on this machine's processor."""
    import torch

    from qwen_vl_lora.parameters import LauncherParameters
    from qwen_vl_lora.ranks.launching import run_on_ranks

    launcher = LauncherParameters(nproc_per_node=2, nnodes=1, rdzv_endpoint=None, rdzv_timeout=120, timeout=timeout)
    return run_on_ranks(work, task, launcher, torch.device("cpu"), folder, on_row)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), wait, {"sign": sys.argv[2]})
