"""One SwanLab run for one run of the project: opened by the first thing that is logged, closed when the run ends.

What fails here never fails the run: `training_log` and the report hold everything that is logged.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qwen_vl_lora.lineage.masking import mask_text, mask_tree
from qwen_vl_lora.parameters import SwanLabParameters
from qwen_vl_lora.tracking.modes import ignored_variables, resolve_mode, writer_environment
from qwen_vl_lora.tracking.process import WriterProcess

logger = logging.getLogger(__name__)

Ending = Literal["success", "crashed", "aborted"]

RECORD_SECONDS = 60
"""The record on this machine needs a moment on a busy one, and no network."""
CLOUD_SECONDS = 5
"""What the cloud has not taken by then is left to `swanlab sync`."""
THUMBNAIL = 256
CHART = "Prediction"

_CURVES = {
    "loss": "train/loss",
    "validation_loss": "validation/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "samples_per_second": "train/samples_per_second",
    "epoch": "train/epoch",
}


class Tracker:
    """Records one run in SwanLab.

    Args:
        settings: the `swanlab` block.
        folder: where SwanLab keeps its runs.
        describe: what is known of the run by now; shown as its configuration. Secrets in it are masked here.
    """

    def __init__(self, settings: SwanLabParameters, folder: Path, describe: Callable[[], Mapping[str, Any]]) -> None:
        self._settings = settings
        self._folder = folder.absolute()
        self._describe = describe
        self._mode = resolve_mode(settings)
        self._writers: dict[str, WriterProcess] = {}
        self._run_id: str | None = None
        self._step = 0
        self._num_heard = 0
        self._has_ended = self._mode == "disabled"

    def warm_up(self) -> None:
        """Start the writers, which take a second; nothing is written until something is logged."""
        if self._has_ended or self._writers:
            return
        with self._mishaps():
            self._folder.mkdir(parents=True, exist_ok=True)
            if ignored := ignored_variables(os.environ):
                logger.warning("%s in the environment: not used, the swanlab block says it.", ", ".join(ignored))
            # The record on this machine never depends on the cloud: another writer sends.
            for mode in ("offline", "online") if self._mode == "online" else (self._mode,):
                self._writers[mode] = WriterProcess(self._folder, writer_environment(mode, self._folder))
            atexit.register(self.finish, "aborted", "The process ended before the run did.")

    def log_row(self, row: Mapping[str, Any]) -> None:
        """A row of `training_log`. Of a resumed training, the rows before it come first."""
        if self._has_ended:
            return
        with self._mishaps():
            self._open(_identity(row))
            self._step = max(self._step, row["step"])
            self._log({curve: row[name] for name, curve in _CURVES.items() if name in row}, row["step"])

    def log_evaluation(self, metrics: Mapping[str, Any], pictures: Callable[[int], Sequence[tuple[Any, str]]]) -> None:
        """Metrics of base and tuned model, and held-out pictures with what both wrote.

        Args:
            metrics: `caption_metrics`.
            pictures: gives so many pictures as Pillow opens them, each with its text.
        """
        if self._has_ended:
            return
        with self._mishaps():
            self._open(None)
            if self._settings.prediction_images:
                opened = pictures(self._settings.prediction_images)
                shown = [{"png": _thumbnail(image), "caption": text} for image, text in opened]
                self._tell({"pictures": {CHART: shown}, "step": self._step})
            sides = {side: metrics[side] for side in ("base", "tuned")}
            self._log({f"evaluation/{name}": value for name, value in _leaves(sides, "/")}, self._step)

    def finish(self, ending: Ending, error: str | None = None) -> None:
        """Close the run. Waits for the record on this machine, and a few seconds for the cloud."""
        if self._has_ended:
            return
        atexit.unregister(self.finish)
        self._has_ended = True
        with self._mishaps():
            if self._run_id is None:
                self._discard()
                return
            self._tell({"config": self._configuration()})
            error = mask_text(error) if error else None
            bounds = {mode: CLOUD_SECONDS if mode == "online" else RECORD_SECONDS for mode in self._writers}
            for mode, writer in self._writers.items():
                writer.tell({"finish": ending, "error": error, "seconds": bounds[mode]})
            self._report({mode: writer.wait(bounds[mode]) for mode, writer in self._writers.items()})

    def _discard(self) -> None:
        for writer in self._writers.values():
            writer.discard()

    def _open(self, identity: str | None) -> None:
        if self._run_id is not None:
            return
        self.warm_up()
        self._run_id = identity or uuid.uuid4().hex[:21]
        named = {
            "log_dir": str(self._folder),
            "project": self._settings.project,
            "workspace": self._settings.workspace,
            "experiment_name": mask_text(self._settings.experiment_name),
            "id": self._run_id,
            "config": self._configuration(),
        }
        for mode, writer in self._writers.items():
            writer.tell({"open": {"mode": mode, **named}})

    def _configuration(self) -> dict[str, Any]:
        """One name for each value: the board's table shows no trees."""
        described = json.loads(json.dumps(mask_tree(dict(self._describe())), default=str))
        return {name: mask_text(value) if isinstance(value, str) else value for name, value in _leaves(described, ".")}

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        self._tell({"log": values, "step": step})

    def _tell(self, message: Mapping[str, Any]) -> None:
        for writer in self._writers.values():
            writer.tell(message)
        self._hear_cloud()

    def _hear_cloud(self) -> None:
        """Say where the run can be watched, or why it cannot."""
        answers = self._writers["online"].answers if "online" in self._writers else []
        news, self._num_heard = answers[self._num_heard :], len(answers)
        for answer in news:
            if "refused" in answer:
                why = mask_text(answer["refused"])
                logger.warning("SwanLab's cloud is not used: %s. The run is recorded on this machine.", why)
            else:
                logger.info("SwanLab: watch the run at %s", answer["url"])

    def _report(self, went_well: Mapping[str, bool]) -> None:
        """One line: where the run is, and what to do with it."""
        self._hear_cloud()
        here = next(iter(self._writers))
        answers = {name: value for answer in self._writers[here].answers for name, value in answer.items()}
        if not went_well[here]:
            logger.warning("SwanLab has no whole record of this run: %s", answers.get("refused", "its writer stopped."))
            return
        sync = f"swanlab sync --id {self._run_id} {_short(Path(answers['folder']))}"
        if self._mode == "local":
            logger.info("SwanLab: look at the run with: swanlab watch %s", _short(self._folder))
        elif self._mode == "offline":
            logger.info("SwanLab: recorded; to send it: %s", sync)
        elif went_well["online"]:
            logger.info("SwanLab: sent; should anything be missing there: %s", sync)
        else:
            logger.warning("SwanLab's cloud did not take the whole run; to send the rest: %s", sync)

    @contextlib.contextmanager
    def _mishaps(self) -> Iterator[None]:
        """A run is worth more than its record here."""
        try:
            yield
        except Exception as error:
            self._has_ended = True
            self._discard()
            logger.warning(
                "SwanLab records no more of this run (%s: %s); it goes on.", type(error).__name__, mask_text(str(error))
            )


def _leaves(tree: Mapping[str, Any], separator: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}{separator}{rest}", leaf) for rest, leaf in _leaves(value, separator))
        elif value is not None:  # SwanLab makes an empty tree of it
            yield name, value


def _identity(row: Mapping[str, Any]) -> str | None:
    """The id of the SwanLab run of a training: it follows from the first row, so that going on finds the same one.

    Its throughput is a measured time, which no other training repeats.
    """
    if "samples_per_second" not in row:
        return None
    return hashlib.sha256(json.dumps(dict(row), sort_keys=True).encode()).hexdigest()[:21]


def _short(path: Path) -> Path:
    """As one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _thumbnail(image: Any) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


_current: Tracker | None = None


def begin_tracking(tracker: Tracker) -> None:
    """Make a tracker the one of the run that begins."""
    global _current
    _current = tracker


def end_tracking(ending: Ending, error: str | None = None) -> None:
    """Finish the current tracker, where there is one."""
    global _current
    ended, _current = _current, None
    if ended is not None:
        ended.finish(ending, error)


def current_tracker() -> Tracker | None:
    """The tracker of the run under way, or None where nothing is tracked."""
    return _current
