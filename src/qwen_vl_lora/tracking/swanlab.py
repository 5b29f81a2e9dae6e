"""SwanLab as a tracker: the messages to its writer processes and their answers. Only they import SwanLab."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import SwanLabParameters
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.masking import mask_text
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.tracking import swanlab_writer
from qwen_vl_lora.tracking.process import WriterProcess, png_of
from qwen_vl_lora.tracking.tracker import Picture, Tracker

logger = logging.getLogger(__name__)

RECORD_SECONDS = 60  # the local record needs time on a busy machine, but no network
CLOUD_SECONDS = 5  # `swanlab sync` sends what the cloud has not received by then
CHART = "Prediction"
KEY = "SWANLAB_API_KEY"

_OF_THE_CLOUD = (KEY, "SWANLAB_API_HOST", "SWANLAB_WEB_HOST", "SWANLAB_ROOT", "SWANLAB_SAVE_DIR")
_BESIDE_A_RUN = ("SWANLAB_DASHBOARD", "SWANLAB_DEBUG", "SWANLAB_SKIP")
_STATES = {"finished": "success", "failed": "crashed", "interrupted": "aborted"}


class SwanLabTracker(Tracker):
    """One run of SwanLab. `open` continues the run of the same identity if the cloud has one.

    Args:
        settings: the `swanlab` block.
        folder: of SwanLab's runs.

    Raises:
        ParameterError: if SwanLab, its board or a key is missing.
    """

    name = "SwanLab"

    def __init__(self, settings: SwanLabParameters, folder: Path) -> None:
        self._mode = checked_mode(settings)
        self._settings = settings
        self._folder = folder.absolute()
        self._writers: dict[str, WriterProcess] = {}
        self._cloud_answered = False

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if ignored := ignored_variables(os.environ):
            logger.warning("%s in the environment: ignored, the swanlab block has it.", ", ".join(ignored))
        # The local record must not depend on the cloud, so another writer sends.
        for mode in ("offline", "online") if self._mode == "online" else (self._mode,):
            environment = writer_environment(mode, self._folder)
            self._writers[mode] = WriterProcess(Path(swanlab_writer.__file__), self._folder, environment)

    def open(self, identity: str, outline: Mapping[str, Any]) -> None:
        named = {
            "log_dir": str(self._folder),
            "project": self._settings.project,
            "workspace": self._settings.workspace,
            "experiment_name": mask_text(self._settings.experiment_name or str(outline.get("run", identity))),
            "id": identity,
            "config": outline,
        }
        for mode, process in self._writers.items():
            process.tell({"open": {"mode": mode, **named}})

    def row(self, values: Mapping[str, float], step: int) -> None:
        self._tell({"log": values, "step": step})

    def pictures(self, shown: Iterator[Picture], step: int) -> None:
        taken = islice(shown, self._settings.prediction_images)
        if chart := [{"png": png_of(image), "caption": text} for image, text in taken]:
            self._tell({"pictures": {CHART: chart}, "step": step})

    def end(self, outcome: Outcome, error: str | None, outline: Mapping[str, Any]) -> None:
        """Close the run. Waits for the local record, and a few seconds for the cloud."""
        self._tell({"config": outline})
        bounds = {mode: CLOUD_SECONDS if mode == "online" else RECORD_SECONDS for mode in self._writers}
        for mode, process in self._writers.items():
            process.tell({"finish": _STATES[outcome], "error": error, "seconds": bounds[mode]})
        self._report({mode: process.wait(bounds[mode]) for mode, process in self._writers.items()})

    def drop(self) -> None:
        for process in self._writers.values():
            process.discard()

    def _tell(self, message: Mapping[str, Any]) -> None:
        for process in self._writers.values():
            process.tell(message)
        self._hear_cloud()

    def _hear_cloud(self) -> None:
        """Log the run's address in the cloud, or why there is none."""
        answer = self._writers["online"].answer if "online" in self._writers else None
        if answer is None or self._cloud_answered:
            return
        self._cloud_answered = True
        if "refused" in answer:
            why = mask_text(answer["refused"])
            logger.warning("SwanLab's cloud is not used: %s. The run is recorded on this machine.", why)
        else:
            logger.info("SwanLab: watch the run at %s", answer["url"])

    def _report(self, went_well: Mapping[str, bool]) -> None:
        """Log one line with the place of the run and the next command."""
        self._hear_cloud()
        here, record = next(iter(self._writers.items()))
        answer = record.answer or {}
        if not went_well[here]:
            logger.warning(
                "SwanLab has no complete record of this run: %s", answer.get("refused", "its writer stopped.")
            )
            return
        sync = f"swanlab sync --id {answer['id']} {relative(Path(answer['folder']), Path.cwd())}"
        if self._mode == "local":
            logger.info("SwanLab: look at the run with: swanlab watch %s", relative(self._folder, Path.cwd()))
        elif self._mode == "offline":
            logger.info("SwanLab: recorded; to send it: %s", sync)
        elif went_well["online"]:
            logger.info("SwanLab: sent; if anything is missing there: %s", sync)
        else:
            logger.warning("SwanLab's cloud did not take the whole run; to send the rest: %s", sync)


def resolve_mode(mode: str) -> str:
    """`auto` is online if the environment has a key, else offline."""
    if mode != "auto":
        return mode
    return "online" if os.environ.get(KEY) else "offline"


def checked_mode(settings: SwanLabParameters) -> str:
    """The mode, after a check that it is possible. Cheap, and uses no network.

    Raises:
        ParameterError: if SwanLab, its board or a key is missing.
    """
    mode = resolve_mode(settings.mode)
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
    logins = os.environ.get("SWANLAB_ROOT") or os.environ.get("SWANLAB_SAVE_DIR") or Path.home() / ".swanlab"
    if mode == "online" and not os.environ.get(KEY) and not Path(logins, ".netrc").is_file():
        raise ParameterError(
            f"swanlab.mode is `online`, but there is no key: set {KEY} in the environment, log in with "
            "`swanlab login`, or set swanlab.mode: offline."
        )
    return mode


def writer_environment(mode: str, folder: Path) -> dict[str, str]:
    """The environment of a writer, without SwanLab's own variables, so that the parameters alone decide.

    Some variables would fail every run: SwanLab cannot parse SWANLAB_PROJECT, which older tutorials set.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    if mode == "online":
        return others | {name: os.environ[name] for name in _OF_THE_CLOUD if name in os.environ}
    nowhere = str(folder / ".none")  # excludes the login and settings of the user's other runs
    return others | {"SWANLAB_ROOT": nowhere, "SWANLAB_CONFIG_DIR": nowhere}


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """SwanLab's variables whose settings `parameters.yml` has here."""
    known = (*_OF_THE_CLOUD, *_BESIDE_A_RUN)
    return sorted(name for name in environment if name.startswith("SWANLAB_") and not name.startswith(known))
