"""Lists of records as JSON files with one record per line.

Each line of a diff is a record, and neither the text nor the records are ever in memory as a whole: `Records` knows
where each line lies and parses it when it is asked for. Lists from elsewhere may have any layout; only a record that is
nested too deeply for Python's parser is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.strict_json import MAX_DEPTH, is_deep

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_OPENED, _BETWEEN, _CLOSED, _EMPTY = b"[\n", b",\n", b"\n]\n", b"[]\n"
"""What stands before, between and after the lines of a file, and the file of an empty list."""

_READ_BYTES, _AT_ONCE = 2**16, 4096
"""Bytes that are read ahead when records are read in turn, and lines whose places are Python numbers at one time."""

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


class Records(Sequence[Any]):
    """The records of a file, each parsed when it is asked for; 16 bytes of memory a record.

    The file is read by its descriptor and not mapped: mapped pages would count as memory of the process. It stays open,
    so that its records are there even if the file is removed meanwhile. Equal to a list of equal records.
    """

    def __init__(self, opened: IO[bytes], file: Path | None = None) -> None:
        """Find the lines of a file that `write_records` wrote.

        Args:
            file: where it can be opened again; None for a temporary one.

        Raises:
            ValueError: if the file has another layout.
        """
        self._file = file
        self._descriptor = os.dup(opened.fileno())
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._shared: Records | None = None
        self._starts, self._stops = _find_lines(opened)

    def choose(self, places: npt.NDArray[np.int64]) -> Self:
        """Return the records at these places, in their order, from the same file."""
        chosen = type(self).__new__(type(self))
        chosen._file, chosen._descriptor, chosen._shared = self._file, self._descriptor, self
        chosen._starts, chosen._stops = self._starts[places], self._stops[places]
        return chosen

    def lines(self) -> Iterator[bytes]:
        """Yield the JSON text of each record."""
        block, first = b"", 0
        for begin in range(0, len(self), _AT_ONCE):
            chosen = slice(begin, begin + _AT_ONCE)
            for start, stop in zip(self._starts[chosen].tolist(), self._stops[chosen].tolist(), strict=True):
                if start < first or stop > first + len(block):
                    block, first = self._read(start, max(stop, start + _READ_BYTES)), start
                yield block[start - first : stop - first]

    def file_sha256(self) -> str | None:
        """Return the hex sha256 of the file's bytes; None for records that were chosen from it."""
        if self._shared is not None:
            return None
        with os.fdopen(os.dup(self._descriptor), "rb") as opened:
            opened.seek(0)  # the descriptors share their place, which no other method reads
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def __iter__(self) -> Iterator[Any]:
        return map(self._parse, self.lines())

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._parse(self._read(int(self._starts[index]), int(self._stops[index])))

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Records({len(self)} in {self._file or 'a temporary file'}, {list(islice(self, 1))[:1]}…)"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the file's place and the places of the lines, so that another process reads the same."""
        if self._file is None:
            raise TypeError("Records of a temporary file cannot be sent to another process; save them first.")
        return _reopen, (self._file.absolute(), self._starts, self._stops)

    def _read(self, start: int, stop: int) -> bytes:
        return os.pread(self._descriptor, stop - start, start)

    def _parse(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataFormatError(
                f"{self._file} has a line that is not a record of JSON: {line[:100]!r}: {error}. "
                "Run data_engineering again, or restore the file."
            ) from error


def open_records(file: Path) -> Any:
    """Return the records of a JSON file: as `Records` if `write_records` wrote it, else the parsed value.

    Raises:
        ValueError: if the file is not JSON.
    """
    with file.open("rb") as opened:
        try:
            return Records(opened, file)
        except ValueError:  # another layout, such as that of an editor
            opened.seek(0)
            return json.load(opened)


def _reopen(file: Path, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Records:
    with file.open("rb") as opened:
        records = Records(opened, file)
    records._starts, records._stops = starts, stops
    return records


def _find_lines(opened: IO[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return first byte and end of each record.

    Raises:
        ValueError: if records do not stand on lines of their own.
    """
    import numpy as np

    opened.seek(0)
    if opened.read(len(_EMPTY) + 1) == _EMPTY:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    opened.seek(0)
    start, tail, num_between, before, ends = opened.read(3), b"", 0, 0, []
    opened.seek(0)
    while block := opened.read(2**22):
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + before)
        num_between += (tail[-2:] + block).count(_BETWEEN + b"{")
        before, tail = before + len(block), (tail + block)[-len(_CLOSED) :]
    places = np.concatenate([np.empty(0, np.int64), *ends])
    if start != _OPENED + b"{" or tail != _CLOSED or len(places) != num_between + 3:
        raise ValueError("not one record per line")
    starts, stops = places[:-2] + 1, places[1:-1].copy()
    stops[:-1] -= len(_BETWEEN) - 1
    return starts, stops


class RecordsInTheMaking(AbstractContextManager["RecordsInTheMaking"]):
    """A temporary file of records without a name: it disappears with the last reader, or with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is on the disk that keeps the file; None is the system's folder of temporary files."""
        self._opened = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed on exit
        self._lines = _Lines(self._opened)

    def append(self, record: Any) -> None:
        self._lines.write(_encode(record))

    def finish(self) -> Records:
        """Return what was written; nothing can be appended afterwards."""
        self._lines.close()
        self._opened.flush()
        return Records(self._opened)

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class _Lines:
    """Writes a JSON list, one item per line."""

    def __init__(self, opened: IO[bytes]) -> None:
        self._opened, self._before = opened, _OPENED

    def write(self, line: bytes) -> None:
        self._opened.write(self._before + line)
        self._before = _BETWEEN

    def close(self) -> None:
        self._opened.write(_CLOSED if self._before == _BETWEEN else _EMPTY)


# With an indent, json uses its pure Python encoder, which is three times slower.
_encoder = json.JSONEncoder(ensure_ascii=False)


def _encode(record: Any) -> bytes:
    return _encoder.encode(record).encode()


def write_records(records: Iterable[Any], file: Path) -> None:
    """Write a JSON list, one item per line. Lines of `Records` are copied."""
    with file.open("wb") as opened:
        lines = _Lines(opened)
        for line in records.lines() if isinstance(records, Records) else map(_encode, records):
            lines.write(line)
        lines.close()
