from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pandas as pd
import pytest
from PIL import Image

from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.scoring.metrics import score_predictions
from qwen_vl_lora.scoring.sheets import draw_comparison_sheet, plot_metrics
from scoring.rows import Row

Make = Callable[[list[Row]], pd.DataFrame]


def rows(count: int) -> list[Row]:
    return [([f"a dog number {i}"], "word " * 200, f"一只狗 {'x' * 80}") for i in range(count)]


@pytest.mark.parametrize(("count", "columns", "opened"), [(1, 1, 1), (5, 4, 5), (40, 4, 16)])
def test_the_sheet_shows_at_most_sixteen_pictures(
    make_predictions: Make, scoring: ScoringParameters, count: int, columns: int, opened: int
) -> None:
    paths: list[str] = []

    def open_image(path: str) -> Image.Image:
        paths.append(path)
        return Image.new("RGB", (50, 400), "teal")

    table = make_predictions(rows(count))
    sheet = draw_comparison_sheet(table, score_predictions(table, scoring)[1], open_image)
    assert len(set(paths)) == opened
    assert sheet.width == columns * 324 + 24


def test_the_sheet_goes_from_the_worst_caption_to_the_best(make_predictions: Make, scoring: ScoringParameters) -> None:
    paths: list[str] = []

    def open_image(path: str) -> Image.Image:
        paths.append(path)
        return Image.new("RGB", (50, 50))

    table = make_predictions([(["a red dog here"], "", "a red dog here"), (["two cats sit there"], "", "no")])
    draw_comparison_sheet(table, score_predictions(table, scoring)[1], open_image)
    assert paths == ["images/1.png", "images/0.png"]


def test_a_missing_picture_leaves_an_empty_field(make_predictions: Make, scoring: ScoringParameters) -> None:
    def fail(path: str) -> Image.Image:
        raise OSError(path)

    table = make_predictions(rows(1))
    sheet = draw_comparison_sheet(table, score_predictions(table, scoring)[1], fail)
    assert sheet.getpixel((150, 100)) == (228, 225, 219)


def test_the_plot_shows_both_sides_with_their_intervals(make_predictions: Make, scoring: ScoringParameters) -> None:
    metrics, _ = score_predictions(make_predictions([(["a dog"], "a cat", "a dog"), (["sky"], "a", "b")]), scoring)
    figure = plot_metrics(metrics)
    bars = {
        (bar.name, name): (value, plus, minus)
        for bar in figure.data
        for name, value, plus, minus in zip(bar.x, bar.y, bar.error_y.array, bar.error_y.arrayminus, strict=True)
    }
    assert len(bars) == 12
    value, plus, minus = bars["tuned", "ROUGE-L"]
    assert value == metrics["tuned"]["ROUGE-L"]
    assert [value - minus, value + plus] == pytest.approx(metrics["confidence"]["tuned"]["ROUGE-L"])


def test_plotly_is_not_imported_before_a_plot_is_drawn() -> None:
    code = "import sys, qwen_vl_lora.scoring.sheets; sys.exit('plotly' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
