"""The trackers of a run. No other module outside a tracker's own files names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.tracking.swanlab import SwanLabTracker, resolve_mode
from qwen_vl_lora.tracking.tracker import Tracker

OPENINGS: Mapping[str, Callable[[Any], bool]] = {
    "swanlab.mode": lambda mode: resolve_mode(mode) == "online",
    "swanlab.workspace": bool,
}
"""Parameter → whether a value of it sends data off this machine. A foreign configuration needs `--trust` for it."""


def choose_trackers(parameters: Parameters, logs: Path, recipe: str) -> list[Tracker]:
    """The trackers that the parameters ask for, none of them started.

    Args:
        logs: the project's folder `logs`; a tracker's files are in `<tracker>/<recipe>` there.

    Raises:
        ParameterError: if a tracker's package or key is missing.
    """
    trackers: list[Tracker] = []
    if parameters.swanlab.mode != "disabled":
        trackers.append(SwanLabTracker(parameters.swanlab, logs / "swanlab" / recipe))
    return trackers
