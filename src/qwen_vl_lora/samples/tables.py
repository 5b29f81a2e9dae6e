"""Tables that people have: one header line, then cells, as CSV of any spreadsheet or program.

Every record is given as a mapping or as the fault that makes it unusable; a record whose end cannot be told
stops the reading. Knows nothing of captions or pictures.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import printable

MAX_CELL_CHARACTERS = 64 * 2**20
"""Above it a record is bad: Python's own limit, 131,072, would refuse a cell that is merely too long to train on."""

_DELIMITERS = ",;\t"
"""Spreadsheets write the second where the comma divides decimals, and the third when cells are copied."""

_OTHER_FILES = (
    (b"PK\x03\x04", "an Excel workbook or another zip archive; save the sheet as CSV UTF-8, or unpack the archive"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV UTF-8"),
    (b"PAR1", "a Parquet file; write it as CSV: pandas.read_parquet(file).to_csv(new_file, index=False)"),
    (b"\x1f\x8b", "compressed with gzip; unpack it: gunzip"),
    (b"\xff\xd8\xff", "a picture; give the file of captions that names it"),
    (b"\x89PNG", "a picture; give the file of captions that names it"),
)
"""How files that people take for a table begin, and what to do with them."""

_WRITE_CSV = "Quote cells as CSV demands, as pandas' to_csv does"


def require_text(opened: IO[bytes], file: Path) -> bytes:
    """The start of a file, read and without a byte order mark.

    Raises:
        DataFormatError: when it is UTF-16, or no text at all, such as a spreadsheet's own format.
    """
    start = opened.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataFormatError(f"{file} is UTF-16. Save it as UTF-8.")
    for signature, found in _OTHER_FILES:
        if start.startswith(signature):
            raise DataFormatError(f"{file} is {found}.")
    if b"\0" in start[:16]:
        raise DataFormatError(
            f"{file} is no UTF-8 text: it begins with {start[:16].decode('latin-1')!a}. Save UTF-16 as UTF-8, and "
            "a spreadsheet as CSV UTF-8."
        )
    return start.removeprefix(b"\xef\xbb\xbf")


def read_table(
    opened: IO[bytes], file: Path, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, str] | RowError]]:
    """Yield number and cells of each record, by column; blank lines are no records.

    `opened` is read from its start. Of the blanks around a cell those before it are dropped. Bytes that are not
    UTF-8 become lone surrogates, which spoil their own record and not the whole file.

    Args:
        columns: which must be there, each once; others are given too.

    Raises:
        DataFormatError: when the header lacks a column, or a quote is not closed on its own line.
    """
    table = _open_table(opened, columns)
    header = _read_header(table, file, columns)
    row = 0
    while True:
        before = table.line_num
        try:
            cells = next(table, None)
        except csv.Error as error:
            if table.line_num > before + 1:
                raise DataFormatError(
                    f"{file}, line {table.line_num}: {_said(error)}. {_WRITE_CSV}; a quote that is never closed "
                    f"swallows what follows it. The record began in line {before + 1}."
                ) from error
            row += 1
            yield row, RowError("malformed_row", f"Line {table.line_num}: {_said(error)}. {_WRITE_CSV}.")
            continue
        if cells is None:
            return
        if cells:
            row += 1
            yield row, _to_record(cells, header)


def _open_table(opened: IO[bytes], columns: Sequence[str]) -> Any:
    """A reader of CSV, its delimiter told from the first line that is not blank."""
    opened.seek(0)
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = (line.decode("utf-8", errors="surrogateescape") for line in opened)
    blank, first = [], ""
    for line in lines:
        first = line.replace("\ufeff", "")  # a byte order mark
        if first.strip():
            break
        blank.append("\n")  # kept, so that messages count lines as an editor does
    delimiter = _delimiter_of(first, columns)
    return csv.reader(chain(blank, [first], lines), delimiter=delimiter, skipinitialspace=True, strict=True)


def _delimiter_of(header: str, columns: Sequence[str]) -> str:
    """The delimiter with which the header names the columns; the comma when none does."""
    for delimiter in _DELIMITERS:
        cells = next(csv.reader(header.splitlines()[:1], delimiter=delimiter, skipinitialspace=True), [])
        if set(columns) <= {cell.strip() for cell in cells}:
            return delimiter
    return _DELIMITERS[0]


def _read_header(table: Iterator[list[str]], file: Path, columns: Sequence[str]) -> list[str]:
    try:
        header = [cell.strip() for cell in next((cells for cells in table if cells), [])]
    except csv.Error as error:
        raise DataFormatError(
            f"{file}: its first line cannot be read: {_said(error)}. {_WRITE_CSV}, with a line feed behind each line."
        ) from error
    missing = [column for column in columns if header.count(column) != 1]
    if missing:
        found = ", ".join(printable(name, 50) for name in header[:20]) or "nothing"
        raise DataFormatError(
            f"{file} needs the column {' and the column '.join(missing)} exactly once; its first line has: {found}. "
            "The first line names the columns, in lower case, separated by commas."
        )
    return header


def _said(error: csv.Error) -> str:
    return "a carriage return outside of quotes" if "new-line" in str(error) else str(error)


def _to_record(cells: list[str], header: list[str]) -> dict[str, str] | RowError:
    found = f"The row has {len(cells)} cells, the header {len(header)}."
    if len(cells) < len(header):
        return RowError("missing_key", f"{found} Every line needs them all; an empty one is written as nothing.")
    if len(cells) > len(header):
        return RowError("malformed_row", f"{found} Quote texts that hold a comma.")
    return dict(zip(header, cells, strict=True))
