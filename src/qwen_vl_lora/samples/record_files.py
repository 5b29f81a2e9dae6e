"""Lists of records as JSON files with one record per line.

Each line of a diff is a record, and the written text is never in memory as a whole. Lists from elsewhere may have
any layout; only a record that is nested too deeply for Python's parser is skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_vl_lora.strict_json import MAX_DEPTH, is_deep

_BLANK = re.compile(r"[ \t\n\r]*")
_BRACKET_OR_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


class TooDeep:
    """Placeholder for a record that is nested more than `MAX_DEPTH` levels deep."""

    reason = f"The record is nested more than {MAX_DEPTH} levels deep."


def read_records(text: str) -> list[Any]:
    """Yield the records of a JSON list, in order, with `TooDeep` for those that are nested too deeply.

    Raises:
        ValueError: if the text is not JSON.
    """
    try:
        records = json.loads(text)
    except RecursionError:
        records = list(_one_by_one(text))
    return [TooDeep() if is_deep(record) else record for record in records]


def _one_by_one(text: str) -> Iterator[Any]:
    """Parse a list like `json.loads`, but keep the other records if one is nested too deeply."""
    decoder = json.JSONDecoder()
    place = _skip(text, _skip(text, 0, "["))
    while not text.startswith("]", place):
        try:
            record, end = decoder.raw_decode(text, place)
        except RecursionError:
            record, end = TooDeep(), _end_of(text, place)
        yield record
        place = _skip(text, end)
        if not text.startswith("]", place):
            place = _skip(text, place, ",")
            if text.startswith("]", place):
                raise json.JSONDecodeError("Expecting value", text, place)
    place = _skip(text, place, "]")
    if place != len(text):
        raise json.JSONDecodeError("Extra data", text, place)


def _skip(text: str, place: int, sign: str = "") -> int:
    """Return the position after blanks, `sign` and blanks."""
    place = _after_blanks(text, place)
    if not text.startswith(sign, place):
        raise json.JSONDecodeError(f"Expecting {sign!r}", text, place)
    return _after_blanks(text, place + len(sign))


def _after_blanks(text: str, place: int) -> int:
    blank = _BLANK.match(text, place)
    return blank.end() if blank else place


def _end_of(text: str, place: int) -> int:
    """Return the position after the list or object that begins at `place`, by counting brackets."""
    depth = 0
    for sign in _BRACKET_OR_TEXT.finditer(text, place):
        depth += (sign[0] in "[{") - (sign[0] in "]}")
        if depth == 0:
            return sign.end()
    raise json.JSONDecodeError("Unterminated record", text, place)


def write_records(records: Iterable[Any], file: Path) -> None:
    """Write a JSON list, one item per line."""
    # With an indent, json uses its pure Python encoder, which is three times slower.
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with file.open("w", encoding="utf-8") as lines:
        before = "[\n"
        for record in records:
            lines.write(f"{before}{encode(record)}")
            before = ",\n"
        lines.write("\n]\n" if before == ",\n" else "[]\n")
