"""Reads CSV tables of any spreadsheet or program: one header line, then cells.

Every record is returned as its cells or as the fault that makes it unusable. A record without a detectable end
stops the reading. Knows nothing of captions or pictures.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import printable

MAX_CELL_CHARACTERS = 64 * 2**20
"""Larger records are bad. Python's own limit, 131,072, would refuse a cell that is only too long to train on."""

_DELIMITERS = ",;\t|"
"""Spreadsheets use the second where the comma is the decimal separator, and the third for copied cells; Flickr30k
uses the last.
"""

_STATED_DELIMITER = re.compile(r"\"?sep=(.)\"?\s*", re.IGNORECASE)
"""The line that states the delimiter for Excel."""

_READ_START = 64 * 1024

_OTHER_FILES = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it: zstd -d"),
    (b"BZh", "compressed with bzip2; unpack it: bunzip2"),
    (b"<!DOCTYPE", "an HTML page that a server sent in place of a file; download the file itself"),
    (b"<!doctype", "an HTML page that a server sent in place of a file; download the file itself"),
    (b"<html", "an HTML page that a server sent in place of a file; download the file itself"),
    (b"\xff\xd8\xff", "a picture; give the captions file that names it"),
    (b"\x89PNG", "a picture; give the captions file that names it"),
)
"""Signatures of files that are mistaken for tables, with the remedy."""

_WRITE_CSV = "Quote cells as CSV requires, as pandas' to_csv does"


def require_text(opened: IO[bytes], file: Path) -> bytes:
    """Return the start of a file, without a byte order mark.

    Raises:
        DataFormatError: when it is UTF-16, or not text, such as a spreadsheet's own format.
    """
    start = opened.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataFormatError(f"{file} is UTF-16. Save it as UTF-8.")
    for signature, found in _OTHER_FILES:
        if start.startswith(signature):
            raise DataFormatError(f"{file} is {found}.")
    if b"\0" in start[:16]:
        raise DataFormatError(
            f"{file} is not UTF-8 text: it begins with {start[:16].decode('latin-1')!a}. Save UTF-16 as UTF-8, and "
            "a spreadsheet as CSV UTF-8."
        )
    return start.removeprefix(b"\xef\xbb\xbf")


Header = Callable[[Sequence[str]], bool]
"""Whether the cells of a line can be the header."""


def read_table(opened: IO[bytes], file: Path, is_header: Header) -> Iterator[tuple[int, list[str] | RowError]]:
    """Yield the header's names with the number 0, then number and cells of each record; blank lines are skipped.

    `opened` is read from its start. `#` comments before the header and Excel's `sep=` are skipped. Blanks before a
    cell are removed. Bytes that are not UTF-8 become lone surrogates, so that only their own record is bad.

    Args:
        is_header: selects the delimiter: the first with which the header line is accepted.

    Raises:
        DataFormatError: when the header cannot be read, or a quote is not closed on its own line.
    """
    table = _open_table(opened, is_header)
    header = _read_header(table, file)
    yield 0, header
    row = 0
    while True:
        before = table.line_num
        try:
            cells = next(table, None)
        except csv.Error as error:
            if table.line_num > before + 1:
                raise DataFormatError(
                    f"{file}, line {table.line_num}: {_said(error)}. {_WRITE_CSV}; an unclosed quote "
                    f"includes all lines after it. The record starts in line {before + 1}."
                ) from error
            row += 1
            yield row, RowError("malformed_row", f"Line {table.line_num}: {_said(error)}. {_WRITE_CSV}.")
            continue
        if cells is None:
            return
        if cells:
            row += 1
            yield row, cells if len(cells) == len(header) else _uneven(cells, header)


def _open_table(opened: IO[bytes], is_header: Header) -> Any:
    """Return a CSV reader; the first line that is neither blank nor a comment gives the delimiter."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = _lines(opened)
    skipped, first, stated = [], "", None
    for line in lines:
        first = line.replace("\ufeff", "")  # a byte order mark
        told = _STATED_DELIMITER.fullmatch(first)
        if first.strip() and told is None and not first.startswith("#"):
            break
        stated = told[1] if told else stated
        skipped.append("\n")  # kept, so that line numbers in messages match an editor
    delimiter = stated or _delimiter_of(first, is_header)
    # Programs that separate by | do not quote cells, and Flickr30k's captions contain quotes.
    return csv.reader(
        chain(skipped, [first], lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL,
        skipinitialspace=True,
        strict=True,
    )


def _lines(opened: IO[bytes]) -> Iterator[str]:
    opened.seek(0)
    start = opened.read(_READ_START)
    opened.seek(0)
    if b"\r" in start and b"\n" not in start:  # line ends of old Macs
        yield from (f"{line}\n" for line in opened.read().decode("utf-8", errors="surrogateescape").split("\r"))
        return
    yield from (line.decode("utf-8", errors="surrogateescape") for line in opened)


def _delimiter_of(header: str, is_header: Header) -> str:
    """Return the delimiter with which the first line is a header; the comma if none fits."""
    for delimiter in _DELIMITERS:
        cells = next(csv.reader(header.splitlines()[:1], delimiter=delimiter, skipinitialspace=True), [])
        if len(cells) > 1 and is_header([cell.strip() for cell in cells]):
            return delimiter
    return _DELIMITERS[0]


def _read_header(table: Iterator[list[str]], file: Path) -> list[str]:
    try:
        return [cell.strip() for cell in next((cells for cells in table if cells), [])]
    except csv.Error as error:
        raise DataFormatError(
            f"{file}: its first line cannot be read: {_said(error)}. {_WRITE_CSV}, with a line feed after each line."
        ) from error


def first_line(header: Sequence[str]) -> str:
    """Return a header for a message."""
    return ", ".join(printable(name, 50) for name in header[:20] if name) or "nothing"


def _said(error: csv.Error) -> str:
    return "a carriage return outside of quotes" if "new-line" in str(error) else str(error)


def _uneven(cells: Sequence[str], header: Sequence[str]) -> RowError:
    found = f"The row has {len(cells)} cells, the header {len(header)}."
    if len(cells) < len(header):
        return RowError("missing_key", f"{found} Every row needs all cells; leave an empty cell blank.")
    return RowError("malformed_row", f"{found} Quote texts that contain a comma.")
