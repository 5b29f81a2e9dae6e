"""A small training for two ranks, which note what they train on or go wrong where they are told to.

As a command: `two_ranks.py FOLDER BASE WORKSPACE` trains there, with the fault that the environment names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import yaml

from qwen_vl_lora.cluster import here
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.training import batch_size, fit, loop
from qwen_vl_lora.training.data import TrainingData
from qwen_vl_lora.training.fit import fit_adapter
from samples.pictures import workspace_folder
from tiny_models import captioned, store_pictures

PARAMETERS = Path(__file__).parents[2] / "conf" / "base" / "parameters.yml"
SIZES = [(112, 112), (56, 140), (140, 84), (84, 56), (84, 84), (56, 56), (112, 56)]
TRAINING = {"num_train_epochs": 2, "save_steps": 2, "logging_steps": 3, "warmup_steps": 0}
train = fit.train  # what the works below end in, also where they stand in its place
FAULT = "QWEN_VL_LORA_TEST_FAULT"
"""`<rank>:<step>:<what>` in the environment."""


class Job:
    """Thirteen captions of seven pictures, two of each but one: a last step of one caption leaves a rank idle."""

    def __init__(self, folder, base):
        self.folder = folder
        self.base = base
        note = folder / "pictures.json"
        if not note.exists():
            note.write_text(json.dumps(store_pictures(folder / "pictures", SIZES).entries))
        entries = [ImageEntry(*entry) for entry in json.loads(note.read_text())]
        self.images = ImageStore(folder / "pictures" / "files", entries, {})
        self.records = [
            captioned(f"{number}/{which}", entry.path, "a star " * (1 + number + which))
            for number, entry in enumerate(self.images)
            for which in range(2)
        ][:-1]

    def train(self, workspace, ranks, batch, *, dropout=0.0, timeout=60, on_row=None, vision="adapted", **training):
        tree = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
        changed = {
            "lora": {**tree["lora"], "r": 4, "lora_dropout": dropout},
            "training_args": {**tree["training_args"], **TRAINING, "per_device_train_batch_size": batch, **training},
            "cluster": {**tree["cluster"], "processes": ranks, "timeout": timeout},
            "vision": vision,  # an adapted tower reads pixels, so no stored features are needed
            "device": "cpu",
            "quarantine": {"max_share": 0.0},
        }
        parameters = validate_parameters({**tree, **changed})
        base, store = BaseModel("tiny", Path(self.base)), FeatureStore(self.folder / "features")
        if vision == "frozen":
            how = (parameters.image, parameters.training_args.dtype, torch.device("cpu"))
            store.publish(encode_pictures(self.images, base, *how, store, self.folder / "staging"))
        data = TrainingData(self.images, store, Conversations(self.records), Conversations(self.records[:5]))
        place = dataclasses.replace(workspace_folder(self.folder), path=self.folder / workspace)
        return fit_adapter(base, data, parameters, place, on_row)

    def steps(self, workspace, ranks):
        """What each rank noted, step by step."""
        folder = self.folder / workspace / "training"
        files = [folder / f"steps-{ranks}-{rank}.jsonl" for rank in range(ranks)]
        return list(zip(*[map(json.loads, file.read_text().splitlines()) for file in files], strict=True))

    def checkpoints(self, workspace):
        return sorted(path.name for path in (self.folder / workspace / "training").glob("*/checkpoint-*"))


def _job_folder(work):
    return next(argument for argument in work if isinstance(argument, Path))


def noting(*work):
    """Train, and write down the rows of each step's passes."""
    file = _job_folder(work).parent / f"steps-{here.world_size()}-{here.rank()}.jsonl"
    collate = loop.StepBatches.collate

    def note(self, conversations):
        planned = loop.plan_passes(conversations, self._settings.rows, self._size)
        rows = [[member.id for member in row.members] for rows in planned for row in rows]
        with file.open("a") as lines:
            lines.write(json.dumps(rows) + "\n")
        return collate(self, conversations)

    loop.StepBatches.collate = note
    return train(*work)


def disagreeing(*work):
    """Train with a batch size that each rank would choose differently."""
    batch_size._largest_that_fits = lambda *_: 4 - here.rank()
    return train(*work)


def faulty(*work):
    """Train until the fault in the environment."""
    rank, step, what = os.environ.get(FAULT, "0:0:none").split(":")
    begin = loop.TrainingLoop.compute_gradients

    def compute_gradients(self, *arguments):
        if here.rank() == int(rank) and self.state.step + 1 == int(step):
            _FAULTS[what]()
        return begin(self, *arguments)

    loop.TrainingLoop.compute_gradients = compute_gradients
    return train(*work)


def sharding(*work):
    """Train until the fault in the environment with sharded weights, and note which part of them this rank holds."""
    if here.world_size() == 1:  # the one process that the ranks are compared with
        return train(*work)
    save = loop.TrainingLoop._save

    def note_and_save(self):
        parameters = [parameter for name, parameter in self.adapted.named_parameters() if ".layers." in name]
        held = sum(parameter.to_local().numel() for parameter in parameters)
        note = _job_folder(work).parent / f"held-{here.rank()}"
        note.write_text(str(held / sum(parameter.numel() for parameter in parameters)))
        save(self)

    loop.TrainingLoop._save = note_and_save
    return faulty(*work)


def _kill_launcher():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def _ask(number):
    os.kill(os.getppid(), number)
    time.sleep(1)


_FAULTS = {
    "launcher killed": _kill_launcher,
    "rank killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hangs": lambda: time.sleep(600),
    "SIGTERM": lambda: _ask(signal.SIGTERM),
    "SIGINT": lambda: _ask(signal.SIGINT),
    "none": lambda: None,
}


if __name__ == "__main__":
    from qwen_vl_lora.cluster import local
    from training import two_ranks  # as ranks import it

    local._START_METHOD = "fork"  # ranks inherit what is imported here; users' ranks are spawned
    fit.train = two_ranks.faulty
    two_ranks.Job(Path(sys.argv[1]), sys.argv[2]).train(sys.argv[3], 2, 2, dropout=0.1)
