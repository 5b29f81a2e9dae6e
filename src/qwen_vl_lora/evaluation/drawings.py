"""The two drawings of the comparison page, as numbers for its template: a histogram of scores and the loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_lora.pages.language import Language
from qwen_vl_lora.pages.page import ticks

_MOST_BINS = 12
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 440.0, 200.0, 34.0, 16.0, 20.0  # units of the SVG


@dataclass(frozen=True, slots=True)
class Bin:
    """One column of a histogram, which is a button: `facet` is the mark of its cards."""

    facet: str
    label: str
    tick: str
    count: int
    percent: int


def histogram(scores: Sequence[float], prefix: str, language: Language) -> tuple[list[Bin], list[str]]:
    """Columns of equal width from 0 to the highest score, and the facet of each score."""
    edges = list(ticks(max(scores, default=0.0), _MOST_BINS))
    places = [max(0, min(len(edges) - 2, math.floor(round(score / edges[1], 9)))) for score in scores]
    counts = [places.count(place) for place in range(len(edges) - 1)]
    bins = [
        Bin(
            facet=f"{prefix}-{place}",
            label=language("bin_label", low=f"{edges[place]:g}", high=f"{edges[place + 1]:g}", count=count),
            tick=f"{edges[place]:g}",
            count=count,
            percent=math.ceil(100 * count / max(counts)) if count else 0,
        )
        for place, count in enumerate(counts)
    ]
    return bins, [f"{prefix}-{place}" for place in places]


@dataclass(frozen=True, slots=True)
class Curves:
    """Loss curves in SVG units: `lines` maps a name to its points, `xs` and `ys` are labelled grid lines."""

    width: float
    height: float
    left: float
    right: float
    lines: Mapping[str, Sequence[tuple[float, float]]]
    xs: Sequence[tuple[float, str]]
    ys: Sequence[tuple[float, str]]
    label: str


def loss_curves(curve: Sequence[Mapping[str, Any]], language: Language) -> Curves | None:
    """The curves of a training, from rows with `step` and one or both of `loss` and `validation_loss`; None without."""
    named = {"training": "loss", "validation": "validation_loss"}
    values = {
        name: [(float(row["step"]), float(row[key])) for row in curve if row.get(key) is not None]
        for name, key in named.items()
    }
    values = {name: points for name, points in values.items() if points}
    every = [point for points in values.values() for point in points]
    if len(every) < 2:
        return None
    xs, ys = list(ticks(max(x for x, _ in every), 5)), list(ticks(max(y for _, y in every), 4))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / xs[-1] * (_WIDTH - _LEFT - _RIGHT)
        return round(across, 1), round(_HEIGHT - _BOTTOM - y / ys[-1] * (_HEIGHT - _BOTTOM - 8), 1)

    ends = language.clauses(
        language("loss_ends", name=language(f"curve_{name}"), first=f"{points[0][1]:.2f}", last=f"{points[-1][1]:.2f}")
        for name, points in values.items()
    )
    return Curves(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        lines={name: [place(*point) for point in points] for name, points in values.items()},
        xs=[(place(x, 0)[0], f"{x:g}") for x in xs],
        ys=[(place(0, y)[1], f"{y:g}") for y in ys],
        label=language("loss_label", steps=f"{max(x for x, _ in every):g}", ends=ends),
    )
