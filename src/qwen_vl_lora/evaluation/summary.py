"""What the terminal shows of an evaluation: metrics with intervals, what to know of them, a few captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_vl_lora.evaluation.metrics import METRICS, notes_on_metrics
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.pages.page import signed
from qwen_vl_lora.texts import visible

_NUM_EXAMPLES = 3
_DIGITS = 3


def summarize_run(
    metrics: Mapping[str, Any], predictions: pd.DataFrame, notes: Sequence[str] = (), language: Language = ENGLISH
) -> RenderableType:
    """A table of metrics, what a reader must know of them, and the first captions before and after.

    Args:
        notes: on the base and the data, to be shown with those on the metrics.
    """
    told = (*notes, *notes_on_metrics(metrics, len(predictions), language), *_cuts(metrics, len(predictions), language))
    parts: list[RenderableType] = [_metrics_table(metrics, len(predictions), language), Text()]
    parts += [Text(f"{note}\n", style="yellow") for note in told]
    return Group(*parts, _examples_table(predictions, language))


def _cuts(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Iterator[str]:
    for side, count in metrics.get("cut_captions", {}).items():
        if count:
            yield language(f"summary_cut_{side}", count=count, all=num_captions)


def _metrics_table(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Table:
    title = language("summary_title", count=metrics["num_images"], tokenizer=metrics["tokenizer"])
    table = _table(language("summary_metric"), title=title, title_justify="left", title_style="bold")
    for heading in ("base", "tuned", "change", "interval"):
        table.add_column(language(f"summary_{heading}"), justify="right", overflow="fold")
    for name in reversed(METRICS):
        change, interval = metrics["delta"][name], metrics.get("confidence", {}).get("delta", {}).get(name)
        values = (f"{metrics['base'][name]:.{_DIGITS}f}", f"{metrics['tuned'][name]:.{_DIGITS}f}")
        shown = "–" if interval is None else " … ".join(signed(end, _DIGITS) for end in interval)
        told = language("summary_nothing", interval=shown) if _is_nothing(change, interval) else shown
        style = "bold" if name == "CIDEr" else None
        table.add_row(name, *values, signed(change, _DIGITS), told, style=style)
    if "exact_match" in metrics:
        base, tuned = (round(metrics["exact_match"][side] * num_captions) for side in ("base", "tuned"))
        counts = (language("summary_of", count=count, all=num_captions) for count in (base, tuned))
        table.add_row(language("summary_exact"), *counts, signed(tuned - base, 0), "")
    return table


def _is_nothing(change: float, interval: Sequence[float] | None) -> bool:
    """Whether a change rounds to 0, or its interval holds 0."""
    return _rounded(change, _DIGITS) == 0 or (interval is not None and interval[0] <= 0 <= interval[1])


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}f}")


def _examples_table(predictions: pd.DataFrame, language: Language) -> Table:
    headings = (language(f"summary_{name}") for name in ("image", "reference", "base", "tuned"))
    table = _table(*headings, show_lines=True)
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
