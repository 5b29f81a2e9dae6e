"""What the ranks of a test do; each rank imports it by name."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from qwen_vl_lora.cluster import here
from qwen_vl_lora.exceptions import DataFormatError


def tell_who(pieces, on_row):
    """Everything that a rank can say, for one launch."""
    logging.getLogger("qwen_vl_lora.work").info("rank %d speaks", here.rank())
    warnings.warn(f"rank {here.rank()} warns", stacklevel=1)
    if here.is_first():
        for step in range(3):
            on_row({"step": step})
    return {"rank": here.rank(), "numbers": here.gather([here.rank(), 0.1], "numbers"), "pieces": pieces}


def fail(fault, on_row):
    """Rank 1 fails as it is told to; rank 0 waits for it."""
    here.note("step 3")
    if here.rank() == 1:
        FAULTS[fault]()
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


def listen(sign, on_row):
    """What this rank listens on, as lines of /proc/net/tcp*, when all are there."""
    here.meet("start")
    mine = {str(place.readlink()) for place in Path("/proc/self/fd").iterdir() if place.exists()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine]


def wait(sign, on_row):
    """Say that all are there, and wait for a signal."""
    here.meet("start")
    if here.is_first():
        Path(sign).touch()
    time.sleep(600)


class Squares:
    """Pieces of work: squares, with a fault at some numbers, once for each file that it makes in the folder.

    No process ends its first piece before as many have begun one as are to be `together`.
    """

    def __init__(self, folder: Path, faults=None, together=1) -> None:
        self.folder = folder
        self.faults = faults or {}
        self.together = together

    def __call__(self, number):
        (self.folder / f"begun by {os.getpid()}").touch()
        while len(list(self.folder.glob("begun by *"))) < self.together:
            time.sleep(0.01)
        fault = self.faults.get(number)
        if fault is not None and (fault == "always killed" or not (self.folder / f"{number} failed").exists()):
            (self.folder / f"{number} failed").touch()
            FAULTS[fault.removeprefix("always ")]()
        with (self.folder / f"done by {os.getpid()}").open("a") as lines:
            lines.write(f"{number}\n")
        time.sleep(0.05)
        return number**2


def cluster(**changes):
    """Two processes on this machine."""
    from qwen_vl_lora.parameters import ClusterParameters

    return ClusterParameters(**{"address": None, "processes": 2, "gpus_per_process": 1, "timeout": 60, **changes})


def launch(work, argument, on_row=None, **changes):
    """Two ranks on this machine's processor."""
    import torch

    from qwen_vl_lora.cluster.work import Processes

    return Processes(cluster(**changes), torch.device("cpu")).on_ranks(work, argument, on_row=on_row)


def play(scene: str) -> dict:
    """One scene on the Ray cluster, as it can be told."""
    import torch

    from cluster.ray_nodes import ADDRESS
    from qwen_vl_lora.cluster.work import Processes
    from qwen_vl_lora.exceptions import QwenVLLoraError

    try:
        if scene == "pieces":
            place = Path("pieces")
            place.mkdir()
            work = Squares(place.absolute(), {3: "killed"})
            done = sorted(Processes(cluster(address=ADDRESS), torch.device("cpu")).in_pieces(work, range(20)))
            return {"given": [one.result for one in done]}
        if scene == "pictures":
            return _check_pictures(ADDRESS)
        if scene == "who":
            rows: list[dict] = []
            return {"given": launch(tell_who, None, on_row=rows.append, address=ADDRESS), "rows": rows}
        return {"given": launch(fail, scene, address=ADDRESS, timeout=12 if scene == "busy" else 60)}
    except QwenVLLoraError as error:
        return {"kind": type(error).__name__, "message": str(error)}


def _check_pictures(address: str) -> dict:
    """Twelve pictures, checked in the cluster and by this process alone."""
    from qwen_vl_lora.parameters import ONE_PROCESS
    from qwen_vl_lora.samples import collection
    from qwen_vl_lora.samples.records import SourceSample, Turn
    from samples.pictures import (
        captions_parameters,
        image_parameters,
        jpeg,
        quarantine_parameters,
        workspace_folder,
        write,
    )

    collection.PIECE_ROWS = 2
    files = [write(Path(f"{number}.jpg").absolute(), jpeg(number)) for number in range(12)]
    rows = [SourceSample(row, f"p{row}", (file,), (Turn("assistant", "x"),)) for row, file in enumerate(files, 1)]
    settings = captions_parameters(), image_parameters(allowed_roots=[str(Path.cwd())]), quarantine_parameters()
    found = {}
    for name, how in (("there", cluster(address=address)), ("here", ONE_PROCESS)):
        collected = collection.collect(rows, workspace_folder(Path(name).absolute()), *settings, cluster=how)
        found[name] = [entry.sha256 for entry in collected.images.entries]
    return found


if __name__ == "__main__":
    from cluster import works  # as ranks import it
    from cluster.ray_nodes import ADDRESS

    logging.basicConfig(level=logging.INFO)
    if sys.argv[1] == "here":
        launch(works.wait, sys.argv[2])
    elif sys.argv[1] == "wait":
        launch(works.wait, sys.argv[2], address=ADDRESS)
    for scene in sys.argv[1:]:
        print(json.dumps(works.play(scene)), flush=True)
