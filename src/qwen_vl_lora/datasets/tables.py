"""CSV tables that are safe to open in a spreadsheet and read back exactly."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from kedro_datasets._typing import TablePreview
from kedro_datasets.pandas import CSVDataset

from qwen_vl_lora.samples.caption_table import CaptionTable
from qwen_vl_lora.samples.texts import spreadsheet_cell, text_of_cell


class SpreadsheetCSVDataset(CSVDataset):
    """`pandas.CSVDataset` whose file holds no text that a spreadsheet would run as a formula.

    Such texts get an apostrophe in the file and lose it when they are loaded.

    ```yaml
    predictions:
      type: qwen_vl_lora.datasets.artifacts.ArtifactDataset
      dataset: {type: qwen_vl_lora.datasets.tables.SpreadsheetCSVDataset, save_args: {index: false}}
      filepath: data/07_model_output/tiny/predictions.csv
    ```

    ```python
    SpreadsheetCSVDataset(filepath="table.csv").save(pd.DataFrame({"caption": ["=1+1"]}))
    ```
    """

    def save(self, data: pd.DataFrame | CaptionTable) -> None:
        if isinstance(data, CaptionTable):
            _write_rows(data, Path(self._get_save_path()))
            return
        table = _map_texts(data, spreadsheet_cell)
        if any(isinstance(cell, str) and "\r" in cell for _, column in table.items() for cell in column):
            # Python's writer leaves a carriage return unquoted before 3.13, and what follows it begins a new row.
            self._save_args = {**self._save_args, "quoting": csv.QUOTE_NONNUMERIC}
        super().save(table)

    def load(self) -> pd.DataFrame:
        return _map_texts(super().load(), text_of_cell)

    def preview(self, nrows: int = 5) -> TablePreview:
        """The first `nrows` rows, or a line that says that there is none."""
        shown: Any = super().preview(nrows)
        if not shown["data"] and shown["columns"]:
            shown = {**shown, "index": [0], "data": [["no row", *[""] * (len(shown["columns"]) - 1)]]}
        return TablePreview(shown)


def _write_rows(table: CaptionTable, file: Path) -> None:
    """Write what pandas would write of the whole table, row by row."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(
            lines,
            lineterminator=os.linesep,
            quoting=csv.QUOTE_NONNUMERIC if table.has_carriage_return else csv.QUOTE_MINIMAL,
        )
        writer.writerow(table.columns)
        for row in table:
            writer.writerow([spreadsheet_cell(cell) if isinstance(cell, str) else cell for cell in row])


def _map_texts(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    def change_text(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    texts = [name for name, column in table.items() if not pd.api.types.is_numeric_dtype(column)]
    return table.assign(**{str(name): table[name].map(change_text) for name in texts})
