"""The stages of a run at the speed that earlier runs had: their time, whether stored features pay, enough processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qwen_vl_lora.training.rows import Row

UNITS = {
    "collect_samples": "rows",
    "encode_images": "pictures",
    "train_adapter": "samples",
    "generate_captions": "captions",
}
"""What the nodes that take time count, in the order in which they run."""


@dataclass(frozen=True)
class Pace:
    """The speed of one process, and the source of the figure."""

    per_second: float
    source: str


@dataclass(frozen=True)
class Stage:
    """A node's work.

    Attributes:
        count: of `unit`, over all epochs and both sides of the comparison.
        pace: None if no earlier run measured it.
        seconds: with the configured number of processes; None without a pace.
    """

    name: str
    count: int
    unit: str
    pace: Pace | None
    seconds: float | None


@dataclass(frozen=True)
class FeatureUse:
    """Whether it pays to store image features, or `vision: adapted` should encode pictures as they are needed.

    Attributes:
        uses: how often training needs the features of a picture, on average.
        stored_seconds: encoding every picture once, in one process; None without a pace.
        streamed_seconds: encoding at every use.
    """

    uses: float
    stored_seconds: float | None
    streamed_seconds: float | None

    @property
    def pays(self) -> bool:
        """Whether encoding at every use would take longer."""
        return self.uses > 1.01


@dataclass(frozen=True)
class Within:
    """The processes that are enough for a time.

    Attributes:
        seconds: the time that was asked for.
        processes: by calculation: the work of all stages, divided evenly.
        left_out: stages without a pace.
    """

    seconds: float
    processes: int
    left_out: list[str]


def stages_of(counts: Mapping[str, int], paces: Mapping[str, Pace], processes: int) -> list[Stage]:
    """The stages with something to do."""
    stages = []
    for name, unit in UNITS.items():
        if counts[name]:
            pace = paces.get(name)
            seconds = counts[name] / (pace.per_second * processes) if pace else None
            stages.append(Stage(name, counts[name], unit, pace, seconds))
    return stages


def feature_use(rows: Iterable[Row], epochs: float, num_pictures: int, encoding: Pace | None) -> FeatureUse | None:
    """How often training would encode a picture that it does not store; None without pictures.

    Args:
        rows: of one epoch; a picture is needed once for each row.
        num_pictures: different pictures of these rows and of the held-out conversations.
    """
    needed, distinct = _pictures(rows)
    if not distinct:
        return None
    uses = epochs * needed / distinct
    if encoding is None:
        return FeatureUse(uses, None, None)
    held_out = num_pictures - distinct
    return FeatureUse(uses, num_pictures / encoding.per_second, (epochs * needed + held_out) / encoding.per_second)


def _pictures(rows: Iterable[Row]) -> tuple[int, int]:
    """Pictures that the rows need, and how many of them differ."""
    needed, distinct = 0, set[str]()
    for row in rows:
        images = row.members[0].images
        needed += len(images)
        distinct.update(images)
    return needed, len(distinct)


def processes_within(seconds: float, stages: Sequence[Stage]) -> Within:
    """How many processes do all stages in a time."""
    needed = sum(stage.count / stage.pace.per_second for stage in stages if stage.pace)
    return Within(seconds, max(1, math.ceil(needed / seconds)), [stage.name for stage in stages if not stage.pace])
