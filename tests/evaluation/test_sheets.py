from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import pandas as pd
import pytest
from PIL import Image

from evaluation.rows import Row
from qwen_vl_lora.evaluation import sheets
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.evaluation.sheets import draw_comparison_sheet, plot_metrics
from qwen_vl_lora.parameters import ScoringParameters
from qwen_vl_lora.samples import lettering
from samples.fonts import StrictFont

Make = Callable[[list[Row]], pd.DataFrame]
TITLE = "tiny: CIDEr 0.00 → 9.26"


HEAD = 2 * 24 + 26 + 8
"""px above the first picture: two gaps and the title in one line."""


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
    sheet = draw_comparison_sheet(table, score_predictions(table, scoring)[1], open_image, TITLE)
    assert len(set(paths)) == opened
    assert sheet.width == columns * 324 + 24


def test_the_sheet_goes_from_the_worst_caption_to_the_best(make_predictions: Make, scoring: ScoringParameters) -> None:
    paths: list[str] = []

    def open_image(path: str) -> Image.Image:
        paths.append(path)
        return Image.new("RGB", (50, 50))

    table = make_predictions([(["a red dog here"], "", "a red dog here"), (["two cats sit there"], "", "no")])
    draw_comparison_sheet(table, score_predictions(table, scoring)[1], open_image, TITLE)
    assert paths == ["images/1.png", "images/0.png"]


def test_a_missing_picture_leaves_an_empty_field(make_predictions: Make, scoring: ScoringParameters) -> None:
    def fail(path: str) -> Image.Image:
        raise OSError(path)

    table = make_predictions(rows(1))
    sheet = draw_comparison_sheet(table, score_predictions(table, scoring)[1], fail, TITLE)
    assert sheet.getpixel((150, HEAD + 100)) == (228, 225, 219)


PARAGRAPHS = "The picture shows a dog.\n\n- It runs.\r\n\t- It barks.\u2028The end.\x00"


@pytest.mark.parametrize("fonts", ["of this machine", "that refuse controls"])
def test_captions_in_paragraphs_are_drawn_in_both_places(
    make_predictions: Make, scoring: ScoringParameters, monkeypatch: pytest.MonkeyPatch, caplog, fonts: str
) -> None:
    if fonts == "that refuse controls":
        monkeypatch.setattr(lettering, "_fonts", lambda size: [StrictFont(size)])
    table = make_predictions([(["a dog"], PARAGRAPHS, PARAGRAPHS), (["a cat"], "", "\n")])
    with caplog.at_level(logging.WARNING):
        sheet = draw_comparison_sheet(
            table, score_predictions(table, scoring)[1], lambda path: Image.new("RGB", (9, 9)), TITLE
        )
    assert sheet.height > 220 + 2 * 24 + 2 * 5 * 20
    assert not caplog.records


def test_a_caption_that_cannot_be_drawn_costs_its_field_and_one_line(
    make_predictions: Make, scoring: ScoringParameters, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(*args: object) -> list[str]:
        raise RuntimeError("raqm_layout() failed.")

    monkeypatch.setattr(sheets, "wrap_text", fail)
    table = make_predictions(rows(3))
    with caplog.at_level(logging.WARNING):
        sheet = draw_comparison_sheet(
            table, score_predictions(table, scoring)[1], lambda path: Image.new("RGB", (300, 220), "teal"), TITLE
        )
    failed_head = 2 * 24 + 2 * 26
    assert sheet.getpixel((150, failed_head + 100)) == (0, 128, 128)
    assert sheet.getpixel((150, failed_head + 220 + 10)) == (228, 225, 219)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("10 parts of the comparison sheet could not be drawn")
    assert "RuntimeError: raqm_layout() failed." in line


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
    code = "import sys, qwen_vl_lora.evaluation.sheets; sys.exit('plotly' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_picture_has_its_scores_and_reference_below_the_title(
    make_predictions: Make, scoring: ScoringParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def note(draw: object, place: object, text: str, **options: object) -> None:
        drawn.append(text)

    monkeypatch.setattr(sheets.ImageDraw.ImageDraw, "text", note)
    table = make_predictions([(["a red dog here"], "", "a red dog here"), (["two cats", "one cat"], "", "one cow")])
    draw_comparison_sheet(table, score_predictions(table, scoring)[1], lambda path: Image.new("RGB", (9, 9)), TITLE)
    scored = score_predictions(table, scoring)[1]["tuned_cider"]
    assert drawn[-1] == TITLE
    assert drawn[:6] == [
        "base · CIDEr 0.00",
        "(empty)",
        f"tuned · CIDEr {scored[1]:.2f}",
        "one cow",
        "reference",
        "one cat",
    ]
    assert drawn[8] == f"tuned · CIDEr {scored[0]:.2f} · exact"
