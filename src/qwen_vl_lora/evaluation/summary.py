"""What the terminal shows of an evaluation: metrics with intervals, what to know of them, a few captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_vl_lora.evaluation.metrics import CIDER_OF_ONE, FEW_IMAGES, METRICS, NOTHING_IN_COMMON, nothing_in_common
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.pages.page import signed
from qwen_vl_lora.texts import visible

_NUM_EXAMPLES = 3
_DIGITS = 3


def summarize_run(metrics: Mapping[str, Any], predictions: pd.DataFrame, notes: Sequence[str] = ()) -> RenderableType:
    """A table of metrics, what a reader must know of them, and the first captions before and after.

    Args:
        notes: on the base and the data, to be shown with those on the metrics.
    """
    parts: list[RenderableType] = [_metrics_table(metrics, len(predictions)), Text()]
    parts += [Text(f"{note}\n", style="yellow") for note in (*notes, *_notes(metrics, len(predictions)))]
    return Group(*parts, _examples_table(predictions))


def _notes(metrics: Mapping[str, Any], num_captions: int) -> Iterator[str]:
    if nothing_in_common(metrics, num_captions):
        yield NOTHING_IN_COMMON
    if metrics["num_images"] < FEW_IMAGES:
        yield f"Metrics on {metrics['num_images']} images mean little; hold out at least {FEW_IMAGES}."
    if num_captions == 1:
        yield CIDER_OF_ONE
    cut = {side: count for side, count in metrics.get("cut_captions", {}).items() if count}
    if cut:
        counts = " and ".join(f"{count} of {num_captions} {side}" for side, count in cut.items())
        yield f"{counts} captions were cut at generation.max_new_tokens."


def _metrics_table(metrics: Mapping[str, Any], num_captions: int) -> Table:
    title = f"{metrics['num_images']} held-out images, tokenizer {metrics['tokenizer']}"
    table = _table("metric", title=title, title_justify="left", title_style="bold")
    for heading in ("base", "tuned", "change", "95 % interval"):
        table.add_column(heading, justify="right", overflow="fold")
    for name in reversed(METRICS):
        change, interval = metrics["delta"][name], metrics.get("confidence", {}).get("delta", {}).get(name)
        values = (f"{metrics['base'][name]:.{_DIGITS}f}", f"{metrics['tuned'][name]:.{_DIGITS}f}")
        shown = "–" if interval is None else " … ".join(signed(end, _DIGITS) for end in interval)
        nothing = ": no difference" if _is_nothing(change, interval) else ""
        style = "bold" if name == "CIDEr" else None
        table.add_row(name, *values, signed(change, _DIGITS), f"{shown}{nothing}", style=style)
    if "exact_match" in metrics:
        base, tuned = (round(metrics["exact_match"][side] * num_captions) for side in ("base", "tuned"))
        of = f"of {num_captions}"
        table.add_row("exact match", f"{base} {of}", f"{tuned} {of}", signed(tuned - base, 0), "")
    return table


def _is_nothing(change: float, interval: Sequence[float] | None) -> bool:
    """Whether a change rounds to 0, or its interval holds 0."""
    return _rounded(change, _DIGITS) == 0 or (interval is not None and interval[0] <= 0 <= interval[1])


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}")


def _examples_table(predictions: pd.DataFrame) -> Table:
    table = _table("image", "reference", "base", "tuned", show_lines=True)
    for item in read_predictions(predictions)[:_NUM_EXAMPLES]:
        # Text, not markup: a caption may hold brackets.
        texts = (item.image_id, item.references[0], item.base_caption, item.tuned_caption)
        table.add_row(*(Text(visible(text)) for text in texts))
    return table


def _table(*headings: str, **options: Any) -> Table:
    """A table that folds a text without blanks, such as Chinese, and never cuts it."""
    table = Table(**options)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
