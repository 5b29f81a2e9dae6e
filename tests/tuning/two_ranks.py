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
from accelerate.state import DistributedType, PartialState

from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.ranks import here
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.tuning import batch_size, launcher, trainer
from qwen_vl_lora.tuning.data import TrainingData
from qwen_vl_lora.tuning.fit import fit_adapter
from qwen_vl_lora.tuning.settings import TrainingSettings
from tiny_models import captioned, store_pictures

PARAMETERS = Path(__file__).parents[2] / "conf" / "base" / "parameters.yml"
SIZES = [(112, 112), (56, 140), (140, 84), (84, 56), (84, 84), (56, 56), (112, 56)]
TRAINING = {"num_train_epochs": 2, "save_steps": 2, "logging_steps": 3, "warmup_steps": 0}
train_rank = launcher.train_rank  # what the works below end in, also where they stand in its place
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

    def train(self, workspace, ranks, batch, *, dropout=0.0, timeout=60, on_log=None, vision="adapted", **training):
        tree = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
        changed = {
            "lora": {**tree["lora"], "r": 4, "lora_dropout": dropout},
            "training_args": {**tree["training_args"], **TRAINING, "per_device_train_batch_size": batch, **training},
            "launcher": {**tree["launcher"], "nproc_per_node": ranks, "timeout": timeout},
            "vision": vision,  # an adapted tower reads pixels, so no stored features are needed
            "device": "cpu",
        }
        parameters = validate_parameters({**tree, **changed})
        blocks = {name: getattr(parameters, name) for name in TrainingSettings.__annotations__ if name != "max_share"}
        settings = TrainingSettings(**blocks, max_share=0.0)
        base, store = BaseModel("tiny", Path(self.base)), FeatureStore(self.folder / "features")
        if vision == "frozen":
            how = (parameters.image, parameters.training_args.dtype, torch.device("cpu"))
            store.publish(encode_pictures(self.images, base, *how, store, self.folder / "staging"))
        data = TrainingData(self.images, store, self.records, self.records[:5])
        return fit_adapter(base, data, settings, self.folder / workspace, on_log, parameters.launcher)

    def steps(self, workspace, ranks):
        """What each rank noted, step by step."""
        folder = self.folder / workspace / "training"
        files = [folder / f"steps-{ranks}-{rank}.jsonl" for rank in range(ranks)]
        return list(zip(*[map(json.loads, file.read_text().splitlines()) for file in files], strict=True))

    def checkpoints(self, workspace):
        return sorted(path.name for path in (self.folder / workspace / "training").glob("*/checkpoint-*"))


def noting(task):
    """Train, and write down the rows of each step's passes."""
    file = Path(task["job_folder"]).parent / f"steps-{here.world_size()}-{here.rank()}.jsonl"
    collate = trainer.CaptionTrainer._collate_step

    def note(self, conversations):
        rows = [[member.id for member in row.members] for rows in self._plan(conversations) for row in rows]
        with file.open("a") as lines:
            lines.write(json.dumps(rows) + "\n")
        return collate(self, conversations)

    trainer.CaptionTrainer._collate_step = note
    return train_rank(task)


def disagreeing(task):
    """Train with a batch size that each rank would choose differently."""
    batch_size._largest_that_fits = lambda *_: 4 - here.rank()
    return train_rank(task)


def faulty(task):
    """Train until the fault in the environment."""
    rank, step, what = os.environ.get(FAULT, "0:0:none").split(":")
    begin = trainer.CaptionTrainer.training_step

    def training_step(self, *arguments):
        if here.rank() == int(rank) and self.state.global_step + 1 == int(step):
            _FAULTS[what]()
        return begin(self, *arguments)

    trainer.CaptionTrainer.training_step = training_step
    return train_rank(task)


def sharding(task):
    """Train until the fault in the environment with sharded weights, and note which part of them this rank holds.

    torch shards on CPUs too, but accelerate offers it for GPUs alone: it is told that it has some.
    """
    create = trainer.CaptionTrainer.create_accelerator_and_postprocess
    save = trainer.CaptionTrainer.save_model

    def as_on_gpus(self):
        PartialState().distributed_type = DistributedType.MULTI_GPU
        create(self)

    def note_and_save(self, *arguments, **named):
        parameters = [parameter for name, parameter in self.model.named_parameters() if ".layers." in name]
        held = sum(parameter.to_local().numel() for parameter in parameters)
        note = Path(task["job_folder"]).parent / f"held-{here.rank()}"
        note.write_text(str(held / sum(parameter.numel() for parameter in parameters)))
        save(self, *arguments, **named)

    trainer.CaptionTrainer.create_accelerator_and_postprocess = as_on_gpus
    trainer.CaptionTrainer.save_model = note_and_save
    return faulty(task)


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
    from qwen_vl_lora.ranks import launching
    from tuning import two_ranks  # as ranks import it

    configured = launching._config
    # Ranks inherit what is imported here; the same training without a fault starts them as users do.
    launching._config = lambda *launch: dataclasses.replace(configured(*launch), start_method="fork")

    launcher.train_rank = two_ranks.faulty
    two_ranks.Job(Path(sys.argv[1]), sys.argv[2]).train(sys.argv[3], 2, 2, dropout=0.1)
