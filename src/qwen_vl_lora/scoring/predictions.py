"""One line of `predictions`, checked: what metrics, report and sheet read.

Knows nothing of how a caption was generated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen_vl_lora.exceptions import DataFormatError

COLUMNS = ("image_id", "image_path", "prompt", "references", "base_caption", "tuned_caption")
_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """One held-out image. A caption may be empty: a model may end its answer at once."""

    image_id: str
    image_path: str
    prompt: str
    references: tuple[str, ...]
    base_caption: str
    tuned_caption: str


def read_predictions(table: pd.DataFrame) -> list[Prediction]:
    """The rows of `predictions`, in order.

    Raises:
        DataFormatError: naming each faulty row, when the table is empty, a column is missing,
            references are no JSON list of texts, or a caption is no text.
    """
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise DataFormatError(
            f"predictions lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "Write it with the evaluation pipeline's generate_captions."
        )
    if table.empty:
        raise DataFormatError(
            "predictions holds no row, so there is nothing to score. Hold out at least one image (split.test_images)."
        )
    faults: list[str] = []
    predictions = [_read_row(row, faults) for row in table[list(COLUMNS)].to_dict("records")]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:_MAX_FAULTS])
        more = f"\n  … and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
        raise DataFormatError(f"predictions holds {len(faults)} faults:\n{shown}{more}")
    return predictions


def _read_row(row: dict[Any, Any], faults: list[str]) -> Prediction:
    where = f"image {row['image_id']!r}"
    for column in ("base_caption", "tuned_caption"):
        if not isinstance(row[column], str):
            faults.append(
                f"{where}: {column} must be a text, came {row[column]!r}. An empty caption is the empty text: "
                "read the CSV with keep_default_na: false."
            )
    return Prediction(
        image_id=str(row["image_id"]),
        image_path=str(row["image_path"]),
        prompt=str(row["prompt"]),
        references=_read_references(row["references"], where, faults),
        base_caption=row["base_caption"],
        tuned_caption=row["tuned_caption"],
    )


def _read_references(cell: object, where: str, faults: list[str]) -> tuple[str, ...]:
    try:
        references = json.loads(cell) if isinstance(cell, str) else None
    except json.JSONDecodeError:
        references = None
    if isinstance(references, list) and references and all(isinstance(text, str) for text in references):
        return tuple(references)
    faults.append(f'{where}: references must be a JSON list with at least one text, such as ["a dog"]; came {cell!r}.')
    return ()
