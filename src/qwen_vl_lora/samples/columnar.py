"""Captions in Parquet and Arrow files, with or without the bytes of their pictures. Each row is one record.

Rows are read in small batches, so memory holds the pictures of one batch, independent of the size of the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples.record_forms import RecordReader, read_or_reject
from qwen_vl_lora.samples.records import Rejection, Row, RowError
from qwen_vl_lora.samples.references import Place
from qwen_vl_lora.samples.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW = ".parquet", ".arrow"
BATCH_BYTES = 4 * 2**20
"""Limit for the rows in memory at once; a larger row is read alone."""

MAX_BATCH_ROWS = 1024
READ_BYTES = 2**20
STATE_FILES = ("state.json", "dataset_dict.json")
"""Files in a folder of `save_to_disk` that list the data files."""


@dataclass(frozen=True)
class ColumnarFiles(Source):
    """Parquet or Arrow files that are one table.

    Attributes:
        files: in the order of their rows.
        image_folder: folder for relative paths of pictures; None is the folder of the first file.
        splits: the split of each file, if names of files or folders state it.
    """

    files: tuple[Path, ...]
    image_folder: Path | None = None
    splits: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    @property
    def folders(self) -> tuple[Path, ...]:
        own = self.files[0].absolute().parent
        return (own,) if self.image_folder is None else (self.image_folder.absolute(), own)

    @property
    def is_quick(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Row]:
        place = Place.of(self.folders[0], self.reading)
        row = 0
        for number, file in enumerate(self.files):
            split = self.splits[number] if number < len(self.splits) else None
            self.bring(file)
            for batch, pictures in _batches(file):
                reader = RecordReader(place, self.reading, holds=pictures)
                for record in _records(batch):
                    row += 1
                    if isinstance(record, RowError):
                        yield Rejection(row, "", record.reason, record.detail)
                        continue
                    if split is not None:
                        record.setdefault("split", split)
                    yield from read_or_reject(reader, record, row)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the `datasets` library."""
    return any((folder / name).is_file() for name in STATE_FILES)


def open_saved_dataset(folder: Path) -> ColumnarFiles:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Raises:
        DataFormatError: when its state cannot be read.
        MissingArtifactError: when it names files that do not exist.
    """
    parts: list[tuple[str | None, Path]] = [(None, folder)]
    if (folder / "dataset_dict.json").is_file():
        names = _read_state(folder / "dataset_dict.json").get("splits")
        parts = [(name, folder / name) for name in _plain_names(folder / "dataset_dict.json", names)]
    files: list[Path] = []
    splits: list[str | None] = []
    for split, part in parts:
        listed = _read_state(part / "state.json").get("_data_files")
        entries = listed if isinstance(listed, list) else []
        names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
        for name in _plain_names(part / "state.json", names):
            files.append(part / name)
            splits.append(split)
    if not files:
        raise MissingArtifactError(f"{folder} is a saved dataset without data files. Save it again.")
    return ColumnarFiles(tuple(files), None, tuple(splits) if any(splits) else ())


def _plain_names(file: Path, names: Any) -> list[str]:
    """Raises: DataFormatError when the values are not names of files or folders beside a file."""
    listed: list[Any] = names if isinstance(names, list) else [None]
    for name in listed:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataFormatError(
                f"{file} names {names!r}; expected the name of a file or folder beside it. Save the dataset again."
            )
    return listed


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingArtifactError(f"File of save_to_disk not found: {file}. Save the dataset again.") from error
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{file} is not valid JSON: {error}. Save the dataset again.") from error
    if not isinstance(state, dict):
        raise DataFormatError(f"{file} is not a JSON object. Save the dataset again.")
    return state


def _batches(file: Path) -> Iterator[tuple[pa.RecordBatch, tuple[str, ...]]]:
    """Yield the rows of a file in parts, with the columns whose values are pictures.

    Raises: DataFormatError when the file is damaged, MissingArtifactError when it does not exist."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise MissingArtifactError(f"File not found: {file}. Check the path, or download the data again.")
    try:
        with file.open("rb") as opened:
            start = opened.read(6)
        if start[:4] == b"PAR1":
            # Read as a stream: otherwise a whole row group of any size is kept in memory.
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as table:
                for group in range(table.num_row_groups):
                    facts = table.metadata.row_group(group)
                    num_rows = _rows_of_batch(facts.total_byte_size, facts.num_rows)
                    pictures = _picture_columns(table.schema_arrow)
                    for batch in table.iter_batches(batch_size=num_rows, row_groups=[group]):
                        yield batch, pictures
            return
        with pa.memory_map(str(file)) as mapped:
            reader = pa.ipc.open_file(mapped) if start == b"ARROW1" else pa.ipc.open_stream(mapped)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if start == b"ARROW1" else iter(reader)
            pictures = _picture_columns(reader.schema)
            for batch in batches:
                num_rows = _rows_of_batch(batch.nbytes, batch.num_rows)
                for begin in range(0, batch.num_rows, num_rows):
                    yield batch.slice(begin, num_rows), pictures
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: the name of a column
        said = " ".join(str(error).split())[:200]
        raise DataFormatError(
            f"{file} cannot be read as Parquet or Arrow: {said}. Write or download it again."
        ) from error


def _rows_of_batch(num_bytes: int, num_rows: int) -> int:
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def _records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | RowError]:
    """Yield the rows of a batch. A row with unreadable values is rejected alone."""
    try:
        batch.validate(full=True)  # a damaged file can place a text outside its buffer
        records = batch.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError and pyarrow's own are ValueErrors
        records = None
    if records is not None:
        yield from records
        return
    for number in range(batch.num_rows):
        row = batch.slice(number, 1)
        try:
            row.validate(full=True)
            yield row.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            is_encoding = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
            said = " ".join(str(error).split())[:200]
            yield RowError(
                "bad_encoding" if is_encoding else "malformed_row", f"A value of the row cannot be read: {said}."
            )


def _picture_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns whose values are pictures: bytes, or Hugging Face's {bytes, path}."""
    import pyarrow as pa

    def holds(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return holds(kind.value_type)
        if pa.types.is_struct(kind):
            return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    return tuple(field.name for field in schema if holds(field.type))
