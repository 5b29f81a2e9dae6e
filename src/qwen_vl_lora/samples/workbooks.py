"""Reads sheets of Excel workbooks as tables of text with openpyxl, an extra: `pip install -e .[excel]`.

Cells are read as displayed: 42 and not 42.0, a date as text, the stored value of a formula. Knows nothing of captions
or pictures.
"""

from __future__ import annotations

import datetime
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.records import RowError

MAX_SHEET_BYTES = 2**31
"""Limit for all unpacked sheets and texts: a workbook is a zip archive, and a small one can contain a huge sheet."""

_WORKBOOK = "xl/workbook.xml"


def is_workbook(file: Path) -> bool:
    """Whether a zip archive is an Excel workbook; an unreadable one is judged by its name."""
    try:
        with zipfile.ZipFile(file) as archive:
            return _WORKBOOK in archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return file.suffix.lower() in (".xlsx", ".xlsm")


def read_workbook(file: Path, is_header: Callable[[Sequence[str]], bool]) -> Iterator[tuple[int, list[str] | RowError]]:
    """Yield the header's names with the number 0, then number and cells of each row that is not empty.

    Reads the first sheet whose first row `is_header`, else the first sheet.

    Raises:
        DataFormatError: when openpyxl is not installed, or the workbook is damaged.
    """
    with _opened(file) as book:
        sheets = book.worksheets
        if not sheets:
            raise DataFormatError(f"{file} has no sheet with cells.")
        chosen = next((sheet for sheet in sheets if is_header(_first_row(sheet))), sheets[0])
        rows = (row for row in map(_texts, chosen.iter_rows(values_only=True)) if row)
        header = next(rows, [])
        yield 0, header
        for number, cells in enumerate(rows, start=1):
            if len(cells) > len(header):
                yield (
                    number,
                    RowError("malformed_row", f"The row has {len(cells)} cells, the header {len(header)}."),
                )
            else:
                yield number, cells + [""] * (len(header) - len(cells))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import openpyxl
    except ImportError as error:
        raise DataFormatError(
            f"{file} is an Excel workbook, and openpyxl, which reads them, is not installed. Install it: "
            "pip install -e .[excel]. Or save the sheet as CSV UTF-8."
        ) from error
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".xml"))
        if size > MAX_SHEET_BYTES:
            raise DataFormatError(f"{file} unpacks to {size} bytes; at most {MAX_SHEET_BYTES} are read.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about styles and extensions that texts do not need
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        try:
            yield book
        finally:
            book.close()
    except DataFormatError:
        raise
    except Exception as error:  # zip, XML and openpyxl can raise anything for a damaged part
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataFormatError(
            f"{file} cannot be read as an Excel workbook: {said}. Save it again, or save the sheet as CSV UTF-8."
        ) from error


def _first_row(sheet: Any) -> list[str]:
    return next((row for row in map(_texts, sheet.iter_rows(values_only=True)) if row), [])


def _texts(values: Sequence[Any]) -> list[str]:
    """Return the cells of a row without trailing empty ones; nothing for an empty row."""
    cells = [_text(value) for value in values]
    while cells and not cells[-1].strip():
        cells.pop()
    return cells


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat(sep=" ") if isinstance(value, datetime.datetime) else value.isoformat()
    return str(value)
