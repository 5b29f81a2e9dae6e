"""Validated rows of `predictions`, for metrics, report and contact sheet.

Independent of how captions were generated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.pages.language import Language, Setting, choose_language

COLUMNS = ("image_id", "image_path", "prompt", "references", "base_caption", "tuned_caption")
CUT_COLUMNS = ("base_cut", "tuned_cut")
"""Columns: whether `generation.max_new_tokens` ended the caption. Tables of older versions lack them."""

YES_OR_NO = {True: "true", False: "false"}
"""The texts of `CUT_COLUMNS`."""

_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """One held-out image.

    Attributes:
        base_caption, tuned_caption: empty if the model ended its answer at once.
        base_cut, tuned_cut: whether `generation.max_new_tokens` ended it; None if the table lacks the column.
    """

    image_id: str
    image_path: str
    prompt: str
    references: tuple[str, ...]
    base_caption: str
    tuned_caption: str
    base_cut: bool | None = None
    tuned_cut: bool | None = None


def read_predictions(table: pd.DataFrame) -> list[Prediction]:
    """The rows of `predictions`, in order.

    Raises:
        DataFormatError: naming each faulty row, if the table is empty, a column is missing,
            references are not a JSON list of texts, a caption is not a text, or a cell of `CUT_COLUMNS` is
            neither true nor false.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise DataFormatError(
            f"predictions lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "Write it with the evaluation pipeline's generate_captions."
        )
    if table.empty:
        raise DataFormatError(
            "predictions has no rows, so there is nothing to score. Hold out at least one image (split.test_images)."
        )
    faults: list[str] = []
    predictions = [_read_row(row, faults) for row in table.to_dict("records")]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS])
        more = f"\n  … and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise DataFormatError(f"predictions has {len(faults)} faults:\n{shown}{more}")
    return predictions


def language_of_references(setting: Setting, table: pd.DataFrame) -> Language:
    """The language that `report.language` asks for; `auto` decides by the references."""
    return choose_language(setting, (text for item in read_predictions(table) for text in item.references))


def _read_row(row: dict[Any, Any], faults: list[str]) -> Prediction:
    where = f"image {row['image_id']!r}"
    for column in ("base_caption", "tuned_caption"):
        if not isinstance(row[column], str):
            faults.append(
                f"{where}: {column} must be a text; got {row[column]!r}. An empty caption is the empty text: "
                "read the CSV with keep_default_na: false."
            )
    return Prediction(
        image_id=str(row["image_id"]),
        image_path=str(row["image_path"]),
        prompt=str(row["prompt"]),
        references=_read_references(row["references"], where, faults),
        base_caption=row["base_caption"],
        tuned_caption=row["tuned_caption"],
        base_cut=_read_cut(row, "base_cut", where, faults),
        tuned_cut=_read_cut(row, "tuned_cut", where, faults),
    )


def _read_cut(row: dict[Any, Any], column: str, where: str, faults: list[str]) -> bool | None:
    if column not in row:
        return None
    said = str(row[column]).lower()  # spreadsheets write True or TRUE
    if said not in YES_OR_NO.values():
        faults.append(f"{where}: {column} must be true or false; got {row[column]!r}.")
    return said == YES_OR_NO[True]


def _read_references(cell: object, where: str, faults: list[str]) -> tuple[str, ...]:
    try:
        references = json.loads(cell) if isinstance(cell, str) else None
    except json.JSONDecodeError:
        references = None
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        return tuple(references)
    faults.append(f'{where}: references must be a JSON list with at least one text, such as ["a dog"]; got {cell!r}.')
    return ()
