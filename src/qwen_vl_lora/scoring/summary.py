"""What a run says at its end: the metrics, a few captions before and after, where the report lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qwen_vl_lora.scoring.metrics import FEW_IMAGES, METRICS
from qwen_vl_lora.scoring.predictions import read_predictions

_NUM_EXAMPLES = 3


def summarize_run(metrics: Mapping[str, Any], predictions: pd.DataFrame, report: Path) -> RenderableType:
    """A table of metrics, the first captions before and after, and the path of the report."""
    parts: list[RenderableType] = [_metrics_table(metrics), Text()]
    if metrics["num_images"] < FEW_IMAGES:
        warning = f"Metrics on {metrics['num_images']} images mean little; hold out at least {FEW_IMAGES}.\n"
        parts.append(Text(warning, style="yellow"))
    parts.append(_examples_table(predictions))
    parts.append(Text.assemble("\nReport: ", (str(report), "bold"), overflow="fold"))
    return Group(*parts)


def _metrics_table(metrics: Mapping[str, Any]) -> Table:
    title = f"{metrics['num_images']} held-out images, tokenizer {metrics['tokenizer']}"
    table = Table("metric", title=title, title_justify="left", title_style="bold")
    for side in ("base", "tuned", "change"):
        table.add_column(side, justify="right")
    for name in reversed(METRICS):
        values = (f"{metrics['base'][name]:.3f}", f"{metrics['tuned'][name]:.3f}", f"{metrics['delta'][name]:+.3f}")
        table.add_row(name, *values, style="bold" if name == "CIDEr" else None)
    return table


def _examples_table(predictions: pd.DataFrame) -> Table:
    table = Table("image", "reference", "base", "tuned", show_lines=True)
    for item in read_predictions(predictions)[:_NUM_EXAMPLES]:
        # Text, not markup: a caption may hold brackets.
        texts = (item.image_id, item.references[0], item.base_caption, item.tuned_caption)
        table.add_row(*(Text(text) for text in texts))
    return table
