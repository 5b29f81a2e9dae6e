"""What trackers are told in these tests, and where it is found again."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from PIL import Image

from tracking.cloud import KEY

METRICS = {side: {"BLEU-4": 0.1 * place, "CIDEr": 1.0 * place} for place, side in enumerate(("base", "tuned", "delta"))}


def row(step, loss):
    return {"step": step, "epoch": step / 10, "loss": loss, "learning_rate": 1e-3, "samples_per_second": 7.0 + step}


def picture(shade):
    return Image.new("RGB", (700, 500), (shade, 90, 90))


def pictures(number=4):
    return [(picture(40 * place), f"base: a long one {place}\ntuned: short {place}") for place in range(number)]


def train(tracker, steps=range(1, 13)):
    for step in steps:
        tracker.log_row(row(step, 1.0 / step))


def losses(steps=range(1, 13)):
    return {step: 1.0 / step for step in steps}


def records(folder):
    """The run folders that SwanLab made, oldest first."""
    return sorted(folder.glob("run-*"))


def synced(folder, run_id, cloud):
    """The run as another cloud has it once the record on this machine was sent there by SwanLab's own command."""
    environment = {**os.environ, "SWANLAB_API_HOST": cloud.address, "SWANLAB_API_KEY": KEY}
    swanlab = [sys.executable, "-c", "from swanlab.cli import cli; cli()"]
    command = [*swanlab, "sync", "--id", run_id, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return cloud.runs[run_id]


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)
