"""The project's `kedro` as a person starts it: a process of its own, in a copy of the configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import warm
from made_once import made_once

PROJECT = Path(__file__).parents[1]
DATA_SLICE = {"captions.num_rows": 24, "split.test_images": 3, "split.validation_images": 2}
TRAINING_SLICE = {
    "device": "cpu",
    "training_args.num_train_epochs": 1,
    "training_args.per_device_train_batch_size": 4,
    "training_args.save_steps": 2,
    "generation.max_new_tokens": 4,
    "scoring.bootstrap_samples": 10,
}


def make_project(folder: Path) -> Path:
    """The project's configuration in a folder, without data."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(PROJECT / "conf", folder / "conf")
    shutil.copy(PROJECT / "pyproject.toml", folder)
    shutil.copy(PROJECT / ".telemetry", folder)
    (folder / "src").mkdir()  # the package itself is installed
    return folder


def project_with_data(root: Path, folder: Path) -> Path:
    """A project in which `data_engineering` has run on the slice. Run once for all test processes, and copied.

    Args:
        root: pytest's base temporary folder.
    """

    def make(project: Path) -> None:
        done = call(kedro_run("data_engineering"), make_project(project))
        assert done.returncode == 0, done.stderr

    return shutil.copytree(made_once(root, "project with data", make), folder)


def kedro_run(pipelines: str, *, env: str | None = None, prefix: tuple[str, ...] = (), **parameters) -> list[str]:
    """The command line; dots in parameters' names are written as two underscores."""
    given = {name.replace("__", "."): value for name, value in parameters.items()}
    params = ",".join(f"{name}={value}" for name, value in {**DATA_SLICE, **given}.items())
    command = [*prefix, sys.executable, "-m", "kedro", "run", "--pipelines", pipelines, "--params", params]
    return command if env is None else [*command, "--env", env]


def call(command: list[str], project: Path, **options) -> subprocess.CompletedProcess[str]:
    """Run to its end, output captured unless `options` say otherwise."""
    return warm.run(command, **{"env": environment(), "cwd": project, **options})


def start(command: list[str], project: Path, **streams) -> warm.Process | subprocess.Popen[str]:
    """Begin, and do not wait for it; text streams."""
    return warm.start(command, env=environment(), cwd=project, **streams)


def environment() -> dict[str, str]:
    """That of a person who set nothing for this project."""
    return {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "DO_NOT_TRACK")}
