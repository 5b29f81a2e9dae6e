from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich.console import Console

from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.scoring.metrics import score_predictions
from qwen_vl_lora.scoring.summary import summarize_run
from scoring.rows import Row

Make = Callable[[list[Row]], pd.DataFrame]


def printed(table: pd.DataFrame, scoring: ScoringParameters) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(summarize_run(score_predictions(table, scoring)[0], table, Path("data/report.html")))
    return console.export_text()


def test_the_summary_names_metrics_captions_and_the_report(make_predictions: Make, scoring: ScoringParameters) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"chatty answer {i}", f"a dog number {i}") for i in range(5)]
    text = printed(make_predictions(rows), scoring)
    assert "CIDEr" in text
    assert "chatty answer 2" in text
    assert "chatty answer 3" not in text
    assert "Metrics on 5 images mean little" in text
    assert "data/report.html" in text


def test_brackets_in_captions_are_no_markup(make_predictions: Make, scoring: ScoringParameters) -> None:
    assert "[bold]a dog[/bold] [/]" in printed(make_predictions([(["a dog"], "[bold]a dog[/bold] [/]", "x")]), scoring)
