"""What the terminal shows of an evaluation: metrics with intervals, what to know of them, a few captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_vl_lora.evaluation.lengths import main_metric
from qwen_vl_lora.evaluation.metrics import METRICS, notes_on_metrics
from qwen_vl_lora.evaluation.predictions import SIDES, read_predictions
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
    count = len(predictions)
    told = [*notes, *notes_on_metrics(metrics, count, language), *_faults(metrics, count, language)]
    parts: list[RenderableType] = [_metrics_table(metrics, len(predictions), language), Text()]
    if "contenders" in metrics:
        parts += [_sides_table(metrics, len(predictions), language), Text()]
    parts += [Text(f"{line}\n") for line in _judged(metrics, language)]
    parts += [Text(f"{note}\n", style="yellow") for note in told]
    return Group(*parts, _examples_table(predictions, language))


def _judged(metrics: Mapping[str, Any], language: Language) -> Iterator[str]:
    """A line for each side that a judge compared with the tuned one, and one for CLIPScore."""
    for side, found in metrics.get("judge", {}).get("against", {}).items():
        if found["tuned_share"] is not None:
            share, *interval = (f"{100 * value:.0f}" for value in (found["tuned_share"], *found["interval"]))
            yield language(
                "summary_judged",
                judge=metrics["judge"]["model"],
                side=language(f"summary_{side}") if side in SIDES else side,
                share=share,
                interval=" … ".join(interval),
                wins=found["tuned_wins"],
                ties=found["ties"],
                count=found["judged"],
            )
    if "clip_score" in metrics:
        sides = metrics["clip_score"]["sides"].items()
        told = (
            f"{language(f'summary_{side}') if side in SIDES else side} {found['CLIPScore']['value']:.3f} / "
            f"{found['RefCLIPScore']['value']:.3f}"
            for side, found in sides
        )
        yield language("summary_clip", scores=language.join(told))


def _faults(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Iterator[str]:
    for side, count in metrics.get("loops", {}).items():
        if count:
            name = language(f"summary_{side}") if side in SIDES else side
            yield language("summary_loops", count=count, all=num_captions, side=name)
    for side, count in metrics.get("cut_captions", {}).items():
        if count:
            key = f"summary_cut_{side if side in SIDES else 'contender'}"
            yield language(key, count=count, all=num_captions, **({} if side in SIDES else {"side": side}))


def _metrics_table(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Table:
    title = language("summary_title", count=metrics["num_images"], tokenizer=metrics["tokenizer"])
    table = _table(language("summary_metric"), title=title, title_justify="left", title_style="bold")
    for heading in ("base", "tuned", "change", "interval"):
        table.add_column(language(f"summary_{heading}"), justify="right", overflow="fold")
    for name in reversed(METRICS):
        change, interval = metrics["delta"][name], metrics.get("confidence", {}).get("delta", {}).get(name)
        values = (f"{metrics['base'][name]:.{_DIGITS}f}", f"{metrics['tuned'][name]:.{_DIGITS}f}")
        told = _interval(change, interval, language)
        style = "bold" if name == main_metric(metrics) else None
        table.add_row(name, *values, signed(change, _DIGITS), told, style=style)
    if "exact_match" in metrics:
        base, tuned = (round(metrics["exact_match"][side] * num_captions) for side in ("base", "tuned"))
        counts = (language("summary_of", count=count, all=num_captions) for count in (base, tuned))
        table.add_row(language("summary_exact"), *counts, signed(tuned - base, 0), "")
    return table


def _sides_table(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Table:
    """Tuned model, base and contenders, one row each."""
    table = _table(language("summary_side"), title=language("summary_sides"), title_justify="left", title_style="bold")
    for heading in ("CIDEr", "ROUGE-L", language("summary_exact"), language("summary_minus")):
        table.add_column(heading, justify="right", overflow="fold")
    delta = metrics["confidence"]["delta"]["CIDEr"]
    sides: dict[str, tuple[Mapping[str, float], float | None, Sequence[float] | None]] = {
        "tuned": (metrics["tuned"], None, None),
        "base": (metrics["base"], metrics["delta"]["CIDEr"], delta),
    }
    sides |= {
        name: (found["scores"], found["delta"]["CIDEr"], metrics["confidence"]["contenders"][name]["delta"]["CIDEr"])
        for name, found in metrics["contenders"].items()
    }
    for side, (scores, minus, interval) in sides.items():
        exact = round(metrics["exact_match"][side] * num_captions)
        told = "" if minus is None else f"{signed(minus, _DIGITS)} ({_interval(minus, interval, language)})"
        name = language(f"summary_{side}") if side in SIDES else side
        shown = (f"{scores[metric]:.{_DIGITS}f}" for metric in ("CIDEr", "ROUGE-L"))
        table.add_row(name, *shown, language("summary_of", count=exact, all=num_captions), told)
    return table


def _interval(change: float, interval: Sequence[float] | None, language: Language) -> str:
    shown = "–" if interval is None else " … ".join(signed(end, _DIGITS) for end in interval)
    return language("summary_nothing", interval=shown) if _is_nothing(change, interval) else shown


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
