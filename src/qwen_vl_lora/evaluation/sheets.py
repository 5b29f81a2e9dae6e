"""Figures of the comparison: a contact sheet and a plot of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from qwen_vl_lora.evaluation.metrics import METRICS
from qwen_vl_lora.evaluation.predictions import Prediction, read_predictions
from qwen_vl_lora.evaluation.wording import nearest_reference
from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.samples.lettering import can_draw, choose_lettering, report_undrawn, wrap_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

OpenImage = Callable[[str], Image.Image]

_PAPER, _INK, _SOFT, _ACCENT, _EMPTY = "#fbfaf8", "#1f2328", "#626a73", "#2f6f6a", "#e4e1db"
_BASE = "#b9b4aa"
_CELL_WIDTH, _PICTURE_HEIGHT, _GAP, _FONT_SIZE = 300, 220, 24, 15  # px
_LINE_HEIGHT, _TITLE_SIZE = 20, 20
_NUM_COLUMNS, _MAX_PICTURES = 4, 16
_MAX_LINES = 7
"""Most lines of a caption on the sheet; a longer one ends with an ellipsis."""


def sheet_language(language: Language) -> Language:
    """The page's language, or English if no font of this machine draws it."""
    return language if can_draw(language("sheet_base", cider="0"), _FONT_SIZE) else ENGLISH


def draw_comparison_sheet(
    predictions: pd.DataFrame,
    scores: pd.DataFrame,
    open_image: OpenImage,
    title: str,
    language: Language = ENGLISH,
) -> Image.Image:
    """Pictures with base and tuned caption, their CIDEr and a reference, from the worst tuned CIDEr to the best.

    If there are too many, they are sampled at even steps of that order, so the sheet represents the
    run. A note replaces text in a script that no font of the system can draw. A part that cannot be drawn is an empty
    field with one line in the log, because the captions themselves are already saved.
    """
    items = read_predictions(predictions)
    ranked = scores["tuned_cider"].to_numpy().argsort(kind="stable")
    steps = np.linspace(0, len(items) - 1, num=min(_MAX_PICTURES, len(items))).round().astype(int)
    chosen = [(items[row], scores.iloc[row]) for row in ranked[steps]]
    columns = min(_NUM_COLUMNS, len(chosen))
    faults: list[Exception] = []
    cells = [_draw_cell(item, score, open_image, faults, language) for item, score in chosen]
    width = columns * (_CELL_WIDTH + _GAP) + _GAP
    head = _draw_lines([(title, _INK)], width - 2 * _GAP, _TITLE_SIZE, faults)
    report_undrawn("comparison sheet", faults)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (width, head.height + sum(heights) + _GAP * (len(rows) + 2)), _PAPER)
    sheet.paste(head, (_GAP, _GAP))
    top = head.height + 2 * _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (_CELL_WIDTH + _GAP), top))
        top += height + _GAP
    return sheet


def _draw_cell(
    item: Prediction, score: Mapping[str, Any], open_image: OpenImage, faults: list[Exception], language: Language
) -> Image.Image:
    picture = _picture(item.image_path, open_image, faults)
    base, tuned = (f"{score[f'{side}_cider']:.2f}" for side in ("base", "tuned"))
    tuned_key, empty = "sheet_tuned_exact" if score["tuned_exact_match"] else "sheet_tuned", language("sheet_empty")
    reference = item.references[nearest_reference(item.tuned_caption, item.references)]
    parts = [
        _draw_caption(language("sheet_base", cider=base), item.base_caption or empty, _SOFT, faults),
        _draw_caption(language(tuned_key, cider=tuned), item.tuned_caption or empty, _INK, faults),
        _draw_caption(language("sheet_reference"), reference, _SOFT, faults),
    ]
    cell = Image.new("RGB", (_CELL_WIDTH, _PICTURE_HEIGHT + sum(part.height for part in parts)), _PAPER)
    cell.paste(picture, ((_CELL_WIDTH - picture.width) // 2, _PICTURE_HEIGHT - picture.height))
    top = _PICTURE_HEIGHT
    for part in parts:
        cell.paste(part, (0, top))
        top += part.height
    return cell


def _draw_caption(side: str, caption: str, colour: str, faults: list[Exception]) -> Image.Image:
    """A strip with the side's name and its caption."""
    return _draw_lines([(side, _ACCENT), (caption, colour)], _CELL_WIDTH, _FONT_SIZE, faults)


def _draw_lines(texts: Sequence[tuple[str, str]], width: int, size: int, faults: list[Exception]) -> Image.Image:
    """A strip of texts below each other, each with its colour and in a font for its script."""
    height = _LINE_HEIGHT * size // _FONT_SIZE
    try:
        lines = [
            (line, colour, font)
            for given, colour in texts
            for text, font in [choose_lettering(given, size)]
            for line in wrap_text(text or "(empty)", font, width, _MAX_LINES)
        ]
        strip = Image.new("RGB", (width, height * len(lines) + 8), _PAPER)
        draw = ImageDraw.Draw(strip)
        for number, (line, colour, font) in enumerate(lines):  # line by line: the font's own line height differs
            draw.text((0, 8 + number * height), line, fill=colour, font=font)
    except Exception as error:  # a text that Pillow cannot draw must not fail the run
        faults.append(error)
        return Image.new("RGB", (width, 2 * height), _EMPTY)
    return strip


def _picture(path: str, open_image: OpenImage, faults: list[Exception]) -> Image.Image:
    try:
        picture = open_image(path).convert("RGB")
        scale = min(_CELL_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)
        return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    except Exception as error:  # as in the report: the sheet is still useful without one picture
        faults.append(error)
        return Image.new("RGB", (_CELL_WIDTH, _PICTURE_HEIGHT), _EMPTY)


def plot_metrics(metrics: Mapping[str, Any]) -> go.Figure:
    """Bars of base and tuned with 95 % intervals; CIDEr has its own scale of 0–10."""
    from plotly.subplots import make_subplots  # slow to import, and only this function draws plots

    figure = make_subplots(rows=1, cols=2, column_widths=[0.22, 0.78], horizontal_spacing=0.07)
    for column, names in enumerate((["CIDEr"], [name for name in reversed(METRICS) if name != "CIDEr"]), start=1):
        for side, colour in (("base", _BASE), ("tuned", _ACCENT)):
            values = [metrics[side][name] for name in names]
            ranges = [metrics["confidence"][side][name] for name in names]
            figure.add_bar(
                x=names,
                y=values,
                name=side,
                marker_color=colour,
                legendgroup=side,
                showlegend=column == 1,
                error_y={
                    "type": "data",
                    "array": [max(0.0, high - value) for value, (_, high) in zip(values, ranges, strict=True)],
                    "arrayminus": [max(0.0, value - low) for value, (low, _) in zip(values, ranges, strict=True)],
                },
                row=1,
                col=column,
            )
    figure.update_yaxes(range=[0, 10.5], row=1, col=1)
    figure.update_yaxes(range=[0, 1.05], row=1, col=2)
    title = f"Base and tuned on {metrics['num_images']} held-out images, with 95 % intervals"
    figure.update_layout(title=title, barmode="group", template="plotly_white", legend={"orientation": "h", "y": -0.12})
    return figure
