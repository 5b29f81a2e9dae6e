"""The tracker protocol, and the current run with its trackers.

A failure here does not stop the run: `training_log` and the report have everything that is logged.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from qwen_vl_lora.runs.comparison import flatten
from qwen_vl_lora.runs.masking import mask_text, mask_tree
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.runs.run import Run, current_run

logger = logging.getLogger(__name__)

Picture = tuple[Any, str]
"""A picture as Pillow opens it, and its text."""

THUMBNAIL = 256

_CURVES = {
    "loss": "train/loss",
    "validation_loss": "validation/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "samples_per_second": "train/samples_per_second",
    "epoch": "train/epoch",
}

MEASURED = ("evaluation/tuned/CIDEr", "evaluation/base/CIDEr", "validation/loss", "train/loss")
"""Values by which runs are compared."""


class Tracker(Protocol):
    """Shows one run elsewhere. `open` is called first, `end` last; a method that is not overridden does nothing.

    When a call raises, one warning gives its error, no further call than `drop` follows, and the run continues. The
    run waits for each call, so a network belongs in a process of its own: `process.WriterProcess`. Secrets are masked
    in all that is passed.

    Attributes:
        name: in messages.
    """

    name: str

    def open(self, identity: str, outline: Mapping[str, Any]) -> None:
        """Called before the first row or picture. A run that has none opens nothing.

        Args:
            identity: 21 hexadecimal digits; the same ones when a training resumes.
            outline: dotted name → value, such as `parameters.lora.r`: what is known of the run so far.
        """

    def row(self, values: Mapping[str, float], step: int) -> None:
        """Values by name: `train/loss` of an optimizer step, `evaluation/tuned/CIDEr` of the last one.

        When a training resumes, its earlier rows come first.
        """

    def pictures(self, shown: Iterator[Picture], step: int) -> None:
        """Held-out pictures (RGB, at most 256 px a side) with the captions of both models. Take as many as you show."""

    def adapter(self, directory: Path) -> None:
        """The adapter has been saved. A copy of it is to be made without waiting for it."""
        return

    def end(self, outcome: Outcome, error: str | None, outline: Mapping[str, Any]) -> None:
        """The run has ended; `outline` now describes all of it. `current_run()`, unless None, has the paths."""

    def start(self) -> None:
        """The first node is about to run: prepare what takes a second. `open` may never follow."""
        return

    def drop(self) -> None:
        """Free what `start` took, without waiting: a call failed, or the run ended before `open`."""
        return


class TrackedRun:
    """The current run: passes rows, pictures and the end to each of its trackers.

    Args:
        trackers: started here.
        run: the run, if it is not the current one.
    """

    def __init__(self, trackers: Iterable[Tracker], run: Run | None = None) -> None:
        self._trackers = list(trackers)
        self._run = run
        self._is_open = False
        self._step = 0
        atexit.register(self.end, "interrupted", "The process ended before the run did.")
        self._tell(lambda tracker: tracker.start())

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Pass on a row of `training_log`. A resumed training passes its earlier rows first."""
        self._open(row)
        self._step = max(self._step, row["step"])
        values = {curve: row[name] for name, curve in _CURVES.items() if name in row}
        self._tell(lambda tracker: tracker.row(values, row["step"]))

    def log_adapter(self, directory: Path) -> None:
        """Pass on where the adapter of this run is."""
        self._open({})
        self._tell(lambda tracker: tracker.adapter(directory))

    def log_evaluation(self, metrics: Mapping[str, Any], pictures: Callable[[], Iterable[Picture]]) -> None:
        """Pass on the metrics of base and tuned model, and held-out pictures with the captions of both.

        Args:
            metrics: `caption_metrics`.
            pictures: returns an iterator, which is read as far as a tracker needs.
        """
        self._open({})
        self._tell(lambda tracker: tracker.pictures(_thumbnails(pictures()), self._step))
        self._tell(lambda tracker: tracker.row(_sides(metrics), self._step))

    def end(self, outcome: Outcome, error: str | None = None) -> None:
        """Report the end of the run, with `error` if it did not finish."""
        atexit.unregister(self.end)
        if self._is_open:
            self._tell(lambda tracker: tracker.end(outcome, error and mask_text(error), self._outline()))
        else:
            self._tell(lambda tracker: tracker.drop())
        self._trackers.clear()

    def _open(self, row: Mapping[str, Any]) -> None:
        if not self._is_open:
            self._is_open = True
            outline = self._outline()
            identity = identity_of(row, outline.get("run", uuid.uuid4().hex))
            self._tell(lambda tracker: tracker.open(identity, outline))

    def _outline(self) -> dict[str, Any]:
        """The facts of the run so far, without secrets, as a flat mapping for trackers' tables."""
        run = self._run or current_run()
        described = json.loads(json.dumps(mask_tree(run.outline() if run is not None else {}), default=str))
        known = {name: value for name, value in flatten(described).items() if value not in (None, {})}
        return {name: mask_text(value) if isinstance(value, str) else value for name, value in known.items()}

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        """Call each tracker; one that fails is dropped."""
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                why = f"{type(error).__name__}: {mask_text(str(error))}"
                logger.warning("%s stopped recording this run (%s); the run continues.", tracker.name, why)
                with contextlib.suppress(Exception):
                    tracker.drop()


def _sides(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {f"evaluation/{side}/{name}": value for side in ("base", "tuned") for name, value in metrics[side].items()}


def identity_of(row: Mapping[str, Any], run: str) -> str:
    """The id of a training, derived from its first row, so that a resumed training has the same.

    The row's measured throughput makes the id unique. Without a row that has one, it is derived from the run's id.
    """
    known = json.dumps(dict(row), sort_keys=True) if "samples_per_second" in row else run
    return hashlib.sha256(known.encode()).hexdigest()[:21]


def picture_text(tuned: str, base: str, reference: str) -> str:
    """What is written under a picture."""
    return f"tuned: {tuned}\nbase: {base}\nreference: {reference}"


def _thumbnails(pictures: Iterable[Picture]) -> Iterator[Picture]:
    for image, text in pictures:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        yield small, text


_current: TrackedRun | None = None


def begin_tracking(trackers: Iterable[Tracker]) -> None:
    """Start the trackers of a new run."""
    global _current
    _current = TrackedRun(trackers)


def end_tracking(outcome: Outcome, error: str | None = None) -> None:
    """End the tracked run, if there is one."""
    global _current
    ended, _current = _current, None
    if ended is not None:
        ended.end(outcome, error)


def current_tracker() -> TrackedRun | None:
    """The tracked run, or None."""
    return _current
