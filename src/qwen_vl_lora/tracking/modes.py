"""Where a run is recorded, and what has to be there for it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import SwanLabParameters

Mode = Literal["offline", "local", "online", "disabled"]

KEY = "SWANLAB_API_KEY"
_OF_THE_CLOUD = (KEY, "SWANLAB_API_HOST", "SWANLAB_WEB_HOST", "SWANLAB_ROOT", "SWANLAB_SAVE_DIR")
_BESIDE_A_RUN = ("SWANLAB_DASHBOARD", "SWANLAB_DEBUG", "SWANLAB_SKIP")


def resolve_mode(settings: SwanLabParameters) -> Mode:
    """`auto` is online where a key is in the environment, offline otherwise."""
    if settings.mode != "auto":
        return settings.mode
    return "online" if os.environ.get(KEY) else "offline"


def check_mode(settings: SwanLabParameters) -> None:
    """Whether a run can be recorded as asked. Cheap, and asks no network.

    Raises:
        ParameterError: if SwanLab, its board or a key is missing.
    """
    mode = resolve_mode(settings)
    if mode == "disabled":
        return
    if importlib.util.find_spec("swanlab") is None:
        raise ParameterError(
            f"swanlab.mode is `{settings.mode}`, but SwanLab is not installed: pip install swanlab, or set "
            "swanlab.mode: disabled."
        )
    if mode == "local" and importlib.util.find_spec("swanboard") is None:
        raise ParameterError(
            "swanlab.mode is `local`, but SwanLab's board is not installed: pip install 'swanlab[dashboard]', or set "
            "swanlab.mode: offline."
        )
    if mode == "online" and not os.environ.get(KEY) and not any(path.is_file() for path in _logins()):
        raise ParameterError(
            f"swanlab.mode is `online`, but there is no key: set {KEY} in the environment, log in with "
            "`swanlab login`, or set swanlab.mode: offline."
        )


def _logins() -> list[Path]:
    """Where `swanlab login` keeps the key."""
    root = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    return [Path(root) / ".netrc"]


def writer_environment(mode: str, folder: Path) -> dict[str, str]:
    """The environment of a writer: one truth for each setting, so SwanLab's own variables do not reach it.

    Some of them would end every run: SwanLab cannot read SWANLAB_PROJECT, which older tutorials set.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    if mode == "online":
        return others | {name: os.environ[name] for name in _OF_THE_CLOUD if name in os.environ}
    nowhere = str(folder / ".none")  # no login and no settings of the user's other runs
    return others | {"SWANLAB_ROOT": nowhere, "SWANLAB_CONFIG_DIR": nowhere}


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """SwanLab's variables that say something which `parameters.yml` says here."""
    known = (*_OF_THE_CLOUD, *_BESIDE_A_RUN)
    return sorted(name for name in environment if name.startswith("SWANLAB_") and not name.startswith(known))
