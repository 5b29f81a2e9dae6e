"""Pictures of the comparison: a contact sheet for a quick look, a plot of the metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from qwen_vl_lora.samples.lettering import choose_lettering, wrap_text
from qwen_vl_lora.scoring.metrics import METRICS
from qwen_vl_lora.scoring.predictions import Prediction, read_predictions

if TYPE_CHECKING:
    import plotly.graph_objects as go

OpenImage = Callable[[str], Image.Image]

_PAPER, _INK, _SOFT, _ACCENT, _EMPTY = "#fbfaf8", "#1f2328", "#626a73", "#2f6f6a", "#e4e1db"
_BASE = "#b9b4aa"
_CELL_WIDTH, _PICTURE_HEIGHT, _GAP, _FONT_SIZE = 300, 220, 24, 15  # px
_LINE_HEIGHT = 20
_NUM_COLUMNS, _MAX_PICTURES = 4, 16
_MAX_LINES = 7
"""Of one caption on the sheet; a longer one ends with an ellipsis."""


def draw_comparison_sheet(predictions: pd.DataFrame, scores: pd.DataFrame, open_image: OpenImage) -> Image.Image:
    """Pictures with the base and the tuned caption under each, from the worst tuned CIDEr to the best.

    Where there are more than fit, they are taken at even steps of that order, so the sheet shows the
    run as it is. A script that no font of the system draws gives way to a note.
    """
    items = read_predictions(predictions)
    ranked = scores["tuned_cider"].to_numpy().argsort(kind="stable")
    steps = np.linspace(0, len(items) - 1, num=min(_MAX_PICTURES, len(items))).round().astype(int)
    items = [items[row] for row in ranked[steps]]
    columns = min(_NUM_COLUMNS, len(items))
    cells = [_draw_cell(item, open_image) for item in items]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    width = columns * (_CELL_WIDTH + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), _PAPER)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (_CELL_WIDTH + _GAP), top))
        top += height + _GAP
    return sheet


def _draw_cell(item: Prediction, open_image: OpenImage) -> Image.Image:
    texts = (("base", item.base_caption, _SOFT), ("tuned", item.tuned_caption, _INK))
    lettered = [(side, *choose_lettering(caption or "(empty)", _FONT_SIZE), colour) for side, caption, colour in texts]
    lines = [
        (side, wrap_text(text, font, _CELL_WIDTH, _MAX_LINES), font, colour) for side, text, font, colour in lettered
    ]
    height = _PICTURE_HEIGHT + sum(_LINE_HEIGHT * (len(text) + 1) + 8 for _, text, _, _ in lines)
    cell = Image.new("RGB", (_CELL_WIDTH, height), _PAPER)
    picture = _picture(item.image_path, open_image)
    cell.paste(picture, ((_CELL_WIDTH - picture.width) // 2, _PICTURE_HEIGHT - picture.height))
    draw = ImageDraw.Draw(cell)
    top = _PICTURE_HEIGHT + 8
    for side, text, font, colour in lines:
        draw.text((0, top), side, fill=_ACCENT, font=font)
        for line in text:  # one by one: a font's own line height would not be that of the cell
            top += _LINE_HEIGHT
            draw.text((0, top), line, fill=colour, font=font)
        top += _LINE_HEIGHT + 8
    return cell


def _picture(path: str, open_image: OpenImage) -> Image.Image:
    try:
        picture = open_image(path).convert("RGB")
    except Exception:  # as in the report: the sheet is worth having without one picture
        return Image.new("RGB", (_CELL_WIDTH, _PICTURE_HEIGHT), _EMPTY)
    scale = min(_CELL_WIDTH / picture.width, _PICTURE_HEIGHT / picture.height)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))


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
