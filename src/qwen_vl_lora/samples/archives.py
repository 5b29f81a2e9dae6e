"""Captions in WebDataset tars: members with the same stem are one sample, such as 000.jpg, 000.txt and 000.json.

The tars are read as streams, one sample at a time. Nothing is unpacked.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.image_stage import MAX_FILE_BYTES
from qwen_vl_lora.samples.record_forms import RecordReader, read_or_reject
from qwen_vl_lora.samples.records import Rejection, Row
from qwen_vl_lora.samples.references import Place
from qwen_vl_lora.samples.sidecars import TEXT_SUFFIXES, captions_of_text
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.texts import printable

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "img", "image")
_TEXTS = tuple(suffix.lstrip(".") for suffix in TEXT_SUFFIXES)
MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True)
class TarShards(Source):
    """Tars of one data set, in the order of their samples."""

    files: tuple[Path, ...]

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.files[0].absolute().parent,)

    @property
    def is_quick(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Row]:
        reader = RecordReader(Place.of(self.folders[0], self.reading), self.reading, holds=("image",))
        row = 0
        for file in self.files:
            self.bring(file)
            for key, members in _samples(file):
                row += 1
                yield from self._read(reader, f"{file.stem}/{key}", members, row)

    def _read(self, reader: RecordReader, key: str, members: dict[str, bytes | None], row: int) -> Iterator[Row]:
        try:
            record = _record_of(members, self.reading.sidecar_lines == "all")
        except ValueError as error:
            yield Rejection(row, printable(key), "malformed_row", f"{printable(key)}: {error}")
            return
        yield from read_or_reject(reader, record, row, name=key)


class _Member(tarfile.TarInfo):
    """A tar member that raises at a bad header; tarfile treats any bad header as the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}; expected a member or the end mark") from error


def _samples(file: Path) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yield key and members of each sample, by suffix; None for a member that is too large."""
    current: str | None = None
    members: dict[str, bytes | None] = {}
    try:
        with tarfile.open(file, "r|*", tarinfo=_Member) as archive:
            for member in archive:
                name = Path(member.name).name
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, suffix = name.partition(".")
                key = str(Path(member.name).with_name(stem))
                if key != current:
                    if current is not None:
                        yield current, members
                    current, members = key, {}
                opened = archive.extractfile(member)
                small = member.size <= MAX_FILE_BYTES and opened is not None
                members[suffix.lower()] = opened.read() if small and opened is not None else None
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataFormatError(f"{file} cannot be read as a tar: {error}. Write or download it again.") from error
    if current is not None:
        yield current, members


def _record_of(members: dict[str, bytes | None], all_lines: bool) -> dict[str, Any]:
    """Return the record of a sample: its picture, and its text or the content of its JSON.

    Raises:
        ValueError: stating what is wrong with the members.
    """
    pictures = [suffix for suffix in members if suffix in _PICTURES]
    texts = [suffix for suffix in members if suffix in _TEXTS]
    if len(pictures) != 1 or len(texts) > 1:
        raise ValueError(f"expected one picture and one text or JSON; got {', '.join(sorted(members)) or 'nothing'}.")
    data = members[pictures[0]]
    if data is None:
        raise ValueError(f"the picture is larger than {MAX_FILE_BYTES} bytes.")
    record: dict[str, Any] = {}
    if "json" in members:
        try:
            described = json.loads((members["json"] or b"").decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its JSON cannot be read: {error}.") from error
        if not isinstance(described, dict):
            raise ValueError("its JSON is not an object.")
        record = described if not texts else {f"json.{key}": value for key, value in described.items()}
    if texts:
        text = members[texts[0]]
        if text is None or len(text) > MAX_TEXT_BYTES:
            raise ValueError(f"its text is larger than {MAX_TEXT_BYTES} bytes.")
        record["captions"] = captions_of_text(text.decode("utf-8-sig"), all_lines)
    others = {suffix: None for suffix in members if suffix not in (*pictures, *texts, "json")}
    return {**{name: value for name, value in record.items() if name != "image"}, **others, "image": data}
