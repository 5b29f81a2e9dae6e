"""A small training job that can be killed anywhere and run again by the same command."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import warm
from command_line import environment

SAVE_STEPS = 3
JOB = {
    "captions": {"num_rows": 40},
    "split": {"test_images": 6, "validation_images": 4},
    "lora": {"r": 4, "lora_dropout": 0.1},
    "training_args": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": SAVE_STEPS,
        "logging_steps": 5,  # does not divide save_steps: log lines must survive a kill too
    },
    "device": "cpu",
    "swanlab": {"mode": "disabled"},
}
NUMBERED = {
    "step": 15,
    "accumulation": 30,
    "write": 5,
    "seal": 5,
    "rename": 5,
    "renamed": 5,
    "prune": 5,
    "validation": 2,
}
ONCE = ("load_best", "stage", "note_run", "publish", "published")


class Killable:
    """A project whose training can be killed and run again."""

    def __init__(self, folder, base, **changes):
        self.folder = folder
        self.params = {**JOB, "base_model": str(base)}
        for key, value in changes.items():
            self.params[key] = {**self.params[key], **value} if isinstance(value, dict) else value
        self._numbers = itertools.count()
        self._log = (folder / "driver.log").open("a")
        self._driver = warm.start(
            [sys.executable, str(Path(__file__).with_name("driver.py"))],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**environment(), "OMP_NUM_THREADS": "1"},  # two would fight for the cores of a busy machine
        )

    def train(self, fault=None):
        """Run `training`; gives the exit status and the steps that began."""
        self.start(["training"], fault)
        return self.finish()

    def start(self, pipelines, fault=None):
        """Begin a run and do not wait for it."""
        self._steps = self.folder / f"steps-{self._driver.pid}-{next(self._numbers)}"
        self._steps.touch()
        order = {"pipelines": pipelines, "params": self.params, "fault": fault, "steps": str(self._steps)}
        self._driver.stdin.write(json.dumps(order) + "\n")
        self._driver.stdin.flush()

    def finish(self):
        """Exit status, minus the signal where one ended the run, and the steps that began."""
        status = json.loads(self._driver.stdout.readline())["status"]
        return status, [int(step) for step in self._steps.read_text().split()]

    def summary(self):
        return json.loads(self.newest("08_reporting/tiny/training_summary.json").read_text())

    def newest(self, path):
        """Path of the newest version below `data/`."""
        folder = self.folder / "data" / path
        return sorted(folder.iterdir())[-1] / folder.name

    def result(self):
        """What must be the same bit for bit: the weights and the log without timings."""
        from qwen_vl_lora.runs.artifacts import log_without_timing

        weights = (self.newest("06_models/tiny/adapter") / "adapter_model.safetensors").read_bytes()
        return weights, log_without_timing(self.newest("08_reporting/tiny/training_log.csv"))

    def close(self):
        self._driver.stdin.close()
        self._driver.kill()
        self._driver.wait()
        self._driver.stdout.close()
        self._log.close()


def seeded_faults(number, seconds, seed):
    """Kinds in turn, in random order and at random places; a third of the kills at random times."""
    chance = random.Random(seed)
    kinds = [*NUMBERED, *ONCE]
    chance.shuffle(kinds)
    turn = itertools.cycle(kinds)
    for place in range(number):
        if place % 3 == 2:
            yield ("seconds", round(chance.uniform(0.05, seconds), 3))
        else:
            kind = next(turn)
            yield (kind, chance.randint(1, NUMBERED.get(kind, 1)))
