"""Validated rows of `predictions`, for metrics, report and contact sheet.

Independent of how captions were generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.pages.language import Language, Setting, choose_language

SIDES = ("base", "tuned")
"""The sides of every evaluation; others are its contenders."""

COLUMNS = ("image_id", "image_path", "prompt", "references", "base_caption", "tuned_caption")
CUT_COLUMNS = ("base_cut", "tuned_cut")
"""Columns: whether `generation.max_new_tokens` ended the caption. Tables of older versions lack them."""

YES_OR_NO = {True: "true", False: "false"}
"""The texts of `CUT_COLUMNS`."""

_MAX_FAULTS = 20


class Written(NamedTuple):
    """A caption, and whether `generation.max_new_tokens` ended it; None if the table lacks the column."""

    caption: str
    cut: bool | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One held-out image.

    Attributes:
        base_caption, tuned_caption: empty if the model ended its answer at once.
        base_cut, tuned_cut: whether `generation.max_new_tokens` ended it; None if the table lacks the column.
        contenders: their captions by name, in the order of the table.
    """

    image_id: str
    image_path: str
    prompt: str
    references: tuple[str, ...]
    base_caption: str
    tuned_caption: str
    base_cut: bool | None = None
    tuned_cut: bool | None = None
    contenders: Mapping[str, Written] = field(default_factory=dict)

    def written(self, side: str) -> Written:
        """The caption of base, tuned or a contender."""
        own = {"base": (self.base_caption, self.base_cut), "tuned": (self.tuned_caption, self.tuned_cut)}
        return Written(*own[side]) if side in own else self.contenders[side]


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
    contenders = contenders_in(table)
    predictions = [_read_row(row, contenders, faults) for row in table.to_dict("records")]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS])
        more = f"\n  … and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise DataFormatError(f"predictions has {len(faults)} faults:\n{shown}{more}")
    return predictions


def language_of_references(setting: Setting, table: pd.DataFrame) -> Language:
    """The language that `report.language` asks for; `auto` decides by the references."""
    return choose_language(setting, (text for item in read_predictions(table) for text in item.references))


def contenders_in(table: pd.DataFrame) -> list[str]:
    """Names of the sides beside base and tuned, in the order of the table."""
    names = [str(column).removesuffix("_caption") for column in table.columns if str(column).endswith("_caption")]
    return [name for name in names if name not in SIDES]


def _read_row(row: dict[Any, Any], contenders: Sequence[str], faults: list[str]) -> Prediction:
    where = f"image {row['image_id']!r}"
    for column in (f"{side}_caption" for side in (*SIDES, *contenders)):
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
        contenders={
            name: Written(row[f"{name}_caption"], _read_cut(row, f"{name}_cut", where, faults)) for name in contenders
        },
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
