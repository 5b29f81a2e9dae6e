"""Selects the source that reads the files of a folder, on this machine or in a data set on a hub.

The names of the files decide: a saved dataset, an imagefolder, Parquet or Arrow files, tars,
pictures with texts beside them, or a table of captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.fetching import Fetcher
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.archives import TarShards
from qwen_vl_lora.samples.columnar import STATE_FILES, ColumnarFiles, is_saved_dataset, open_saved_dataset
from qwen_vl_lora.samples.named_pictures import PICTURE_SUFFIXES
from qwen_vl_lora.samples.records import Rejection, Row, Split
from qwen_vl_lora.samples.sidecars import Sidecars, files_below, has_sidecars
from qwen_vl_lora.samples.source import Fetches, Reading, Source
from qwen_vl_lora.samples.sources import FORMS, CaptionsFile

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLIT_COLUMN = "split"
"""Name in `captions.split_column` for a split that names of files or folders state."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Metadata files of a Hugging Face imagefolder: paths are relative to the folder of the file."""

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz", ".token.txt")
_NO_TABLES = (*STATE_FILES, "dataset_info.json", "dataset_infos.json", "config.json")

_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_WORDS = re.compile(r"[^a-z]+")


@dataclass(frozen=True)
class Several(Source):
    """Several sources in sequence; each row names the source that it comes from."""

    parts: tuple[tuple[str, Source, int | None], ...]
    """Name, source, and the number of rows to take; None takes all."""

    def __str__(self) -> str:
        return ", ".join(str(source) for _, source, _ in self.parts)

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(folder for _, source, _ in self.parts for folder in source.folders)

    @property
    def is_local(self) -> bool:
        return all(source.is_local for _, source, _ in self.parts)

    @property
    def is_quick(self) -> bool:
        return all(source.is_quick for _, source, _ in self.parts)

    def check(self) -> None:
        for _, source, _ in self.parts:
            source.check()

    def fetcher(self, image: ImageParameters) -> Fetches | None:
        found = [fetcher for _, source, _ in self.parts if (fetcher := source.fetcher(image))]
        return max(found, key=lambda fetcher: not isinstance(fetcher, Fetcher), default=None)  # others fetch URLs too

    def read_as(self, reading: Reading) -> Several:
        return self._each(lambda source: source.read_as(reading), reading)

    def brought_by(self, bring: Callable[[Path], None]) -> Several:
        return self._each(lambda source: source.brought_by(bring), self.reading)

    def _each(self, change: Callable[[Source], Source], reading: Reading) -> Several:
        parts = tuple((name, change(source), num_rows) for name, source, num_rows in self.parts)
        return replace(self, parts=parts, reading=reading)

    def __iter__(self) -> Iterator[Row]:
        for name, source, num_rows in self.parts:
            rows: set[int] = set()
            for row in source:
                rows.add(row.row)
                if num_rows is not None and len(rows) > num_rows:
                    break
                yield replace(row, source=name)


@dataclass(frozen=True)
class OfSplit(Source):
    """A table whose file or folder is named after its split, for `captions.split_column=split`."""

    table: Source
    split: Split

    def __str__(self) -> str:
        return str(self.table)

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.table.folders

    @property
    def is_quick(self) -> bool:
        return self.table.is_quick

    def read_as(self, reading: Reading) -> OfSplit:
        is_asked = reading.split_column == SPLIT_COLUMN
        inner = replace(reading, split_column=None) if is_asked else reading
        return replace(self, table=self.table.read_as(inner), reading=reading)

    def brought_by(self, bring: Callable[[Path], None]) -> OfSplit:
        return replace(self, table=self.table.brought_by(bring))

    def __iter__(self) -> Iterator[Row]:
        is_asked = self.reading.split_column == SPLIT_COLUMN
        for row in self.table:
            yield replace(row, split=self.split) if is_asked and not isinstance(row, Rejection) else row


def open_folder(folder: Path, image_folder: Path | None = None) -> Source:
    """Return the source in a folder of this machine. Raises: DataFormatError, MissingArtifactError."""
    return open_files(folder, files_below(folder), image_folder)


def open_files(folder: Path, files: Sequence[Path], image_folder: Path | None = None) -> Source:
    """Return the source for the files of a folder. Only the state files of a saved dataset must exist already.

    Raises:
        DataFormatError: when the files are not captions, or are ambiguous.
    """
    if is_saved_dataset(folder):
        return open_saved_dataset(folder)
    if metadata := [file for file in files if file.name in _METADATA]:
        return _open_imagefolder(folder, metadata)
    for suffix in (".parquet", ".arrow"):
        if chosen := [file for file in files if file.suffix.lower() == suffix]:
            return _open_columnar(folder, chosen, image_folder or folder)
    if shards := [file for file in files if file.name.lower().endswith(TAR_SUFFIXES)]:
        return TarShards(tuple(shards))
    if has_sidecars(files):
        return Sidecars(folder, tuple(files))
    if tables := [file for file in files if file.name.lower().endswith(_TABLES) and file.name not in _NO_TABLES]:
        return _open_tables(folder, tables, image_folder)
    _refuse_folder(folder, files)
    raise AssertionError("unreachable")


def split_named(path: PurePath) -> Split | None:
    """Return the split that a relative path names: in the name of the file, else of its folders."""
    for part in reversed(path.parts):
        for word in _WORDS.split(part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _open_imagefolder(folder: Path, metadata: Sequence[Path]) -> Source:
    """Return one metadata file, or one for each split in a folder of its name."""
    parents = [file.parent for file in metadata]
    if len(set(parents)) < len(parents):
        raise DataFormatError(
            f"{folder} has several metadata files in one folder: {_named(folder, metadata)}. Keep one of them."
        )
    return _open_each(folder, metadata, [file.parent.relative_to(folder).as_posix() for file in metadata], None)


def _open_tables(folder: Path, tables: Sequence[Path], image_folder: Path | None) -> Source:
    """Return one table, or one for each split."""
    splits = [split_named(PurePath(file.name)) for file in tables]
    if len(tables) > 1 and (None in splits or len(set(splits)) < len(splits)):
        raise DataFormatError(
            f"{folder} has several files that can be captions: {_named(folder, tables)}. Name one of them."
        )
    return _open_each(folder, tables, [file.name.partition(".")[0] for file in tables], image_folder)


def _open_each(folder: Path, files: Sequence[Path], names: Sequence[str], image_folder: Path | None) -> Source:
    sources: list[Source] = []
    for file in files:
        split = split_named(file.relative_to(folder))
        if file.suffix == ".parquet":
            sources.append(ColumnarFiles((file,), image_folder or file.parent, (split,) if split else ()))
        else:
            table = CaptionsFile(file, image_folder or file.parent)
            sources.append(OfSplit(table, split) if split else table)
    if len(sources) == 1:
        return sources[0]
    return Several(tuple((name, source, None) for name, source in zip(names, sources, strict=True)))


def _open_columnar(folder: Path, files: Sequence[Path], image_folder: Path) -> Source:
    """Return the files of one table, as the hubs name them: `data/train-00000-of-00002.parquet`."""
    relative = [file.relative_to(folder) for file in files]
    tables = {tuple(part for part in path.parent.parts if split_named(PurePath(part)) is None) for path in relative}
    if len(tables) > 1:
        listed = ", ".join(sorted("/".join(parts) or "." for parts in tables)[:8])
        raise DataFormatError(f"{folder} has several tables in folders of their own: {listed}. Name one of them.")
    splits = tuple(map(split_named, relative))
    return ColumnarFiles(tuple(files), image_folder, splits if any(splits) else ())


def _named(folder: Path, files: Sequence[Path]) -> str:
    return ", ".join(file.relative_to(folder).as_posix() for file in files[:6])


def _refuse_folder(folder: Path, files: Sequence[Path]) -> None:
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        found = _named(folder, files) or "no file"
        scripts = [file.name for file in files if file.suffix == ".py"]
        remedy = (
            f" {scripts[0]} is a script, and scripts are not run; on Hugging Face take the revision "
            "refs/convert/parquet."
            if scripts
            else " Zip files are not read: unpack them."
            if any(file.suffix.lower() == ".zip" for file in files)
            else ""
        )
        raise MissingArtifactError(f"The captions file {folder} is a folder with {found}. Expected {FORMS}.{remedy}")
    inner = {path.parent for path in pictures} - {folder}
    if inner:
        raise DataFormatError(
            f"{folder} has subfolders of pictures ({', '.join(sorted(path.name for path in inner)[:4])}), but no "
            "captions. A folder's name is a class, not a caption. Write a table with image_path and caption, or a "
            "text beside each picture (a.jpg and a.txt)."
        )
    raise DataFormatError(
        f"{folder} has pictures and no captions. Write a text beside each picture (a.jpg and a.txt), or a table with "
        "image_path and caption. To caption them with a model: kedro run --pipeline inference --params "
        f'"inference.images={folder}".'
    )
