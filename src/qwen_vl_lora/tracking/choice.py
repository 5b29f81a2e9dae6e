"""The trackers of a run. No other module outside a tracker's own files names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.tracking.mlflow import MLflowTracker
from qwen_vl_lora.tracking.swanlab import SwanLabTracker, resolve_mode
from qwen_vl_lora.tracking.tensorboard import TensorBoardTracker
from qwen_vl_lora.tracking.tracker import Tracker

OPENINGS: Mapping[str, Callable[[Any], bool]] = {
    "swanlab.mode": lambda mode: resolve_mode(mode) == "online",
    "swanlab.workspace": bool,
    "trackers": lambda names: "mlflow" in (names or ()),
    "mlflow.tracking_uri": bool,
    "mlflow.experiment": bool,
}
"""Parameter → whether a value of it sends data off this machine. A foreign configuration needs `--trust` for it."""

PLUGINS = ("kedro_mlflow", "kedro-mlflow")
"""Kedro plugins whose hooks are not called: this one sends every parameter unmasked, and a server that is away stops
the run. The tracker reads its `mlflow.yml`."""


def choose_trackers(
    parameters: Parameters, logs: Path, recipe: str, configurations: Sequence[Path] = ()
) -> list[Tracker]:
    """The trackers that the parameters ask for, none of them started.

    Args:
        logs: the project's folder `logs`; a tracker's files are in `<tracker>/<recipe>` there.
        configurations: the run's folders of the project's own `conf/`, the more specific one last.

    Raises:
        ParameterError: if a tracker's package, key or server is missing.
    """
    trackers: list[Tracker] = []
    if "swanlab" in parameters.trackers and parameters.swanlab.mode != "disabled":
        trackers.append(SwanLabTracker(parameters.swanlab, logs / "swanlab" / recipe))
    if "mlflow" in parameters.trackers:
        trackers.append(MLflowTracker(parameters.mlflow, configurations))
    if "tensorboard" in parameters.trackers:
        trackers.append(TensorBoardTracker(parameters.tensorboard, logs / "tensorboard" / recipe))
    return trackers
