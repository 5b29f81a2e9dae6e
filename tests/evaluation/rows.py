"""Predictions as generate_captions writes them, from a few words."""

from __future__ import annotations

import json

import pandas as pd

Row = tuple[list[str], str, str]
"""References, base caption, tuned caption."""


def with_contender(table: pd.DataFrame, name: str, captions: list[str]) -> pd.DataFrame:
    """The table with the captions of one more side, none of which was cut."""
    return table.assign(**{f"{name}_caption": captions, f"{name}_cut": "false"})


def table_of(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "image_id": f"image_{number}",
                "image_path": f"images/{number}.png",
                "prompt": "Describe it:",
                "references": json.dumps(references, ensure_ascii=False),
                "base_caption": base,
                "tuned_caption": tuned,
            }
            for number, (references, base, tuned) in enumerate(rows)
        ]
    )
