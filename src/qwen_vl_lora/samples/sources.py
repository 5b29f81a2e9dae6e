"""Captions in one file: a table, JSON or JSON Lines of any common form, recognised by content and not by name.

Pictures remain paths until a row is checked. This module knows the layout of files; `record_forms` knows one record,
`fields` the names of columns and keys, `published` the files of public data sets.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples import published
from qwen_vl_lora.samples.fields import Fields, find_fields, is_readable
from qwen_vl_lora.samples.meanings import check_flag
from qwen_vl_lora.samples.record_files import TooDeep, read_records
from qwen_vl_lora.samples.record_forms import RecordReader, read_or_reject
from qwen_vl_lora.samples.records import Rejection, Row, RowError, SourceSample, Turn
from qwen_vl_lora.samples.references import Place, id_from_reference
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.tables import first_line, read_table, require_text
from qwen_vl_lora.samples.values import captions_of, split_of
from qwen_vl_lora.samples.workbooks import is_workbook, read_workbook
from qwen_vl_lora.strict_json import MAX_DEPTH, is_deep

FORMS = (
    "CSV with the columns image_path and caption, JSON or JSON Lines of captions, LLaVA, ShareGPT, ms-swift, OpenAI or "
    "the tutorials, a COCO captions file"
)

_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_COMMENT = re.compile(r"(^|[\s,\[{])(//|/\*)", re.MULTILINE)


@dataclass(frozen=True)
class CaptionsFile(Source):
    """One file of captions.

    Attributes:
        file: CSV of any delimiter, Flickr8k's token file, a JSON list, a JSON object of a public data set, or JSON
            Lines; any of them compressed with gzip.
        image_folder: folder for relative paths of pictures; None is the folder of the file.
    """

    file: Path
    image_folder: Path | None = None

    def __str__(self) -> str:
        return str(self.file)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders whose pictures may always be read: the folder of the file, and `image_folder`."""
        own = self.file.absolute().parent
        return (own,) if self.image_folder is None else (self.image_folder.absolute(), own)

    def __iter__(self) -> Iterator[Row]:
        self.bring(self.file)
        require_file(self.file, FORMS)
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise MissingArtifactError(f"Folder of pictures not found: {self.image_folder}. Check image_folder.")
        with self.file.open("rb") as opened:
            start = opened.read(4)
            opened.seek(0)
            if start == _ZIP and is_workbook(self.file):
                yield from self._rows_of_table(read_workbook(self.file, self._is_header))
            elif start[:2] == _GZIP:
                yield from self._rows_of_compressed(opened)
            else:
                yield from self._rows(opened)

    def _rows_of_compressed(self, opened: IO[bytes]) -> Iterator[Row]:
        try:
            with gzip.open(opened) as text:
                yield from self._rows(cast(IO[bytes], text))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataFormatError(f"{self.file} is a damaged gzip file: {error}. Download it again.") from error

    @property
    def _reader(self) -> RecordReader:
        return RecordReader(Place.of(self.folders[0], self.reading), self.reading)

    def _rows(self, opened: IO[bytes]) -> Iterator[Row]:
        start = _start(opened, self.file)
        opened.seek(0)
        if start.startswith("["):
            yield from self._rows_of_records(_parse_whole(opened, self.file, read_records))
        elif start.startswith("{"):
            yield from self._rows_of_lines(opened)
        elif published.is_token_file(start):
            yield from published.rows_of_token_file(opened, self._reader.place)
        else:
            yield from self._rows_of_table(read_table(opened, self.file, self._is_header))

    def _is_header(self, names: Sequence[str]) -> bool:
        return is_readable(names, self.reading)

    def _rows_of_table(self, lines: Iterator[tuple[int, list[str] | RowError]]) -> Iterator[Row]:
        _, header = next(lines)
        assert isinstance(header, list)
        table = _Table.of(header, self._reader, self.file)
        for row, cells in lines:
            yield from table.read(row, cells)

    def _rows_of_records(self, records: Iterable[Any]) -> Iterator[Row]:
        reader = self._reader
        for row, record in enumerate(records, start=1):
            yield from read_or_reject(reader, record, row)

    def _rows_of_lines(self, opened: IO[bytes]) -> Iterator[Row]:
        tree = _only_object(opened, self.file)
        if tree is not None:
            yield from self._rows_of_object(tree)
            return
        reader = self._reader
        lines = (line for line in opened if line.removeprefix(b"\xef\xbb\xbf").strip())
        for row, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Rejection(row, "", "bad_encoding", f"The line is not UTF-8: {error}.")
            except (ValueError, RecursionError) as error:
                yield Rejection(row, "", "malformed_row", f"The line is not JSON: {error}.")
            else:
                yield from read_or_reject(reader, TooDeep() if is_deep(record) else record, row)

    def _rows_of_object(self, tree: Any) -> Iterator[Row]:
        """Read one JSON object: a file of a public data set, a table written by pandas, or a single record."""
        records = published.records_of_object(tree)
        if records is not None:
            yield from self._rows_of_records(records)
        elif published.is_coco(tree):
            yield from published.rows_of_coco(tree, self.file, self._reader, self.image_folder)
        else:
            published.refuse_object(tree, self.file, FORMS)
            yield from read_or_reject(self._reader, tree, 1)


@dataclass(frozen=True, slots=True)
class _Table:
    """The header of a table, and how its rows become samples. Column positions are looked up once."""

    reader: RecordReader
    fields: Fields
    image: int
    captions: tuple[int, ...]
    id: int | None
    split: int | None
    flags: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, header: Sequence[str], reader: RecordReader, file: Path) -> _Table:
        """Raises: DataFormatError when the header names no picture or no caption, or is ambiguous."""
        try:
            fields = find_fields(header, reader.reading)
        except DataFormatError as fault:
            raise DataFormatError(f"{file}: {fault}") from fault
        missing = [
            *([] if fields.image else ["a picture (image_path)"]),
            *([] if fields.captions else ["a caption (caption)"]),
        ]
        if fields.image is None or missing:
            raise DataFormatError(
                f"{file} needs a column for {' and one for '.join(missing)}; its first line has: {first_line(header)}. "
                "The first line names the columns, separated by commas. Other names can be given: "
                "captions.columns.image=…, captions.columns.caption=…."
            )
        places = {name: place for place, name in enumerate(header)}
        return cls(
            reader,
            fields,
            places[fields.image],
            tuple(places[name] for name in fields.captions),
            places[fields.id] if fields.id else None,
            places[fields.split] if fields.split else None,
            tuple((name, places[name]) for name in fields.flags),
        )

    def read(self, row: int, cells: list[str] | RowError) -> Sequence[Row]:
        """Yield the samples of one row, one for each of its captions, or its rejection."""
        if isinstance(cells, RowError):
            return (Rejection(row, "", cells.reason, cells.detail),)
        place = self.reader.place
        reference = cells[self.image].strip()
        own = cells[self.id].strip() if self.id is not None else ""
        image_id = own or id_from_reference(reference, place.folder)
        try:
            for name, flag in self.flags:
                check_flag(name, cells[flag])
            image = place.resolve(reference)
            split = split_of(cells[self.split]) if self.split is not None else None
            texts = [cells[column] for column in self.captions]
            if len(texts) > 1 or texts[0].lstrip()[:1] in ("[", "("):
                texts = captions_of(texts, {})
        except RowError as fault:
            return (Rejection(row, image_id, fault.reason, fault.detail),)
        images, ignored, is_given = (image,), self.fields.ignored, bool(own)
        return [
            SourceSample(row, image_id, images, (Turn("assistant", text),), is_given, "caption", split, ignored=ignored)
            for text in texts
        ]


def require_file(file: Path, what: str) -> None:
    """Raises: MissingArtifactError when the file does not exist."""
    if file.is_file():
        return
    if not file.is_dir():
        raise MissingArtifactError(f"Captions file not found: {file}. Expected {what}. Check the path.")
    inside = sorted(path.name for path in file.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
    remedy = f"It contains {', '.join(inside[:5])}: give one of them." if inside else "Give a file in it."
    raise MissingArtifactError(f"The captions file {file} is a folder. Expected {what}. {remedy}")


def _start(opened: IO[bytes], file: Path) -> str:
    """Return the first characters that are not blank."""
    text = require_text(opened, file).lstrip()
    if not text and not opened.read(1):
        raise DataFormatError(f"{file} is empty. Expected {FORMS}.")
    return text.decode("utf-8", errors="replace")


def _parse_whole(opened: IO[bytes], file: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    data = opened.read()
    try:
        tree = parse(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{file} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except RecursionError as error:
        raise _nested(file) from error
    except ValueError as error:
        remedy = "It may be cut short; export it again."
        if _COMMENT.search(data[:100_000].decode("utf-8", errors="replace")):
            remedy = "It contains comments (// or /*), which JSON does not allow; remove them."
        raise DataFormatError(f"{file} is not valid JSON: {error}. {remedy}") from error
    if parse is json.loads and is_deep(tree):
        raise _nested(file)
    return tree


def _nested(file: Path) -> DataFormatError:
    return DataFormatError(f"{file} is nested more than {MAX_DEPTH} levels deep. Expected {FORMS}.")


def _only_object(opened: IO[bytes], file: Path) -> Any:
    """Return the JSON object of a file, on one line or several; None for JSON Lines."""
    lines = (line for line in opened if line.removeprefix(b"\xef\xbb\xbf").strip())
    first, has_more = next(lines), next(lines, None) is not None
    opened.seek(0)
    if has_more and _is_json(first):
        return None
    try:
        return _parse_whole(opened, file)
    except DataFormatError:
        if not has_more:
            raise
        return None  # JSON Lines with a bad first line, which is rejected; the others are read
    finally:
        opened.seek(0)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True
