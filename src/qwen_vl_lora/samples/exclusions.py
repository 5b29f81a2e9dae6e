"""The rows that a user leaves out: `captions.exclude`, a list that the data page writes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples.identity import shown_id
from qwen_vl_lora.samples.records import Rejection, Row
from qwen_vl_lora.samples.texts import printable, text_of_cell

COLUMNS = ("row", "image_id", "source")
"""Of the list. `source` names one of several sources; it is empty, or the column is absent, where there is one."""

_Named = dict[tuple[str, int], str]
_REMEDY = "Write the list with the data page, or set captions.exclude: null."


def leave_out(rows: Iterable[Row], file: Path, *, all_rows: bool) -> Iterator[Row]:
    """Yield the rows; those that the list names as rejected, with the reason `excluded`.

    Args:
        all_rows: whether `rows` are all rows of the source, so that the list may name no other.

    Raises:
        MissingArtifactError: when the list does not exist.
        DataFormatError: when the list cannot be read, or belongs to another source.
    """
    named = _read(file)
    left = dict(named)
    for row in rows:
        key = (row.source or "", row.row)
        if key not in named:
            yield row
            continue
        left.pop(key, None)
        given = row.image_id if isinstance(row, Rejection) else row.id
        if not _is_same(named[key], given):
            raise DataFormatError(
                f"captions.exclude: {file} names row {row.row} with the image_id {printable(named[key])!r}, but row "
                f"{row.row} of the source has {printable(given)!r}. The list belongs to another source. {_REMEDY}"
            )
        yield Rejection(row.row, given, "excluded", f"Named in captions.exclude ({file.name}).", row.source)
    if all_rows and left:
        (_, number), image_id = next(iter(left.items()))
        raise DataFormatError(
            f"captions.exclude: {file} names {len(left)} rows that the source does not have; the first is row {number} "
            f"({printable(image_id)!r}). The list belongs to another source. {_REMEDY}"
        )


def _is_same(listed: str, given: str) -> bool:
    """Whether the list names this id: as it is shown, and perhaps with the start of the picture's hash behind it."""
    own = (given, shown_id(given), printable(given))
    return listed in own or listed.rpartition("-")[0] in own


def _read(file: Path) -> _Named:
    named: _Named = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            missing = [name for name in COLUMNS[:2] if name not in (rows.fieldnames or ())]
            if missing:
                raise DataFormatError(
                    f"captions.exclude: {file} lacks the column {' and '.join(missing)}; it has "
                    f"{', '.join(map(printable, rows.fieldnames or ['no columns']))}. {_REMEDY}"
                )
            for row in rows:
                number = (row["row"] or "").strip()
                if not (number.isascii() and number.isdigit()):
                    raise DataFormatError(
                        f"captions.exclude: line {rows.line_num} of {file}: expected the number of a row in the column "
                        f"row; got {printable(number)!r}. {_REMEDY}"
                    )
                named[text_of_cell(row.get("source") or ""), int(number)] = text_of_cell(row["image_id"] or "")
    except FileNotFoundError as error:
        raise MissingArtifactError(f"captions.exclude: file not found: {file}. {_REMEDY}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(f"captions.exclude: {file} is not a CSV that can be read: {error}. {_REMEDY}") from error
    return named
