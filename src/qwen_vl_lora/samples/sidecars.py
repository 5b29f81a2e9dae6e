"""A folder of pictures with their captions beside them: `a.jpg` and `a.txt` or `a.caption`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_lora.samples.named_pictures import PICTURE_SUFFIXES
from qwen_vl_lora.samples.records import Rejection, Row, RowError, SourceSample, Turn
from qwen_vl_lora.samples.references import id_from_reference
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.texts import printable

TEXT_SUFFIXES = (".txt", ".caption")
MAX_TEXT_BYTES = 2**20

_NO_CAPTIONS = frozenset(("readme", "license", "licence", "classes", "notes", "info"))
"""Texts in folders of pictures that are not sidecars."""


@dataclass(frozen=True)
class Sidecars(Source):
    """Pictures below a folder, each with a text of the same name. One line is one caption, as in kohya's trainer."""

    folder: Path
    files: tuple[Path, ...] | None = None
    """The files of the folder; None lists them."""

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self.folder.absolute(),)

    def __iter__(self) -> Iterator[Row]:
        found = files_below(self.folder) if self.files is None else self.files
        pictures = [path for path in found if path.suffix.lower() in PICTURE_SUFFIXES]
        texts = {path for path in found if path.suffix.lower() in TEXT_SUFFIXES}
        for row, picture in enumerate(pictures, start=1):
            beside = [text for text in _beside(picture) if text in texts]
            texts.difference_update(beside)
            yield from self._read(row, picture, beside)
        lone = [text for text in sorted(texts) if text.stem.lower() not in _NO_CAPTIONS]
        for number, text in enumerate(lone, start=len(pictures) + 1):
            yield Rejection(
                number, printable(text.name), "missing_image", f"{text} has no picture of the same name beside it."
            )

    def _read(self, row: int, picture: Path, beside: list[Path]) -> Iterator[Row]:
        image_id = id_from_reference(picture.relative_to(self.folder).as_posix(), self.folder)
        try:
            if len(beside) != 1:
                names = f"{picture.stem}.txt or {picture.stem}.caption"
                raise RowError(
                    "malformed_row" if beside else "missing_key",
                    f"{picture} has {len(beside) or 'no'} text{'s' if beside else ''} beside it; expected {names}.",
                )
            self.bring(beside[0])
            captions = captions_of_text(_read_text(beside[0]), self.reading.sidecar_lines == "all")
            if not captions:
                raise RowError("empty_caption", f"{beside[0]} is empty.")
        except RowError as fault:
            yield Rejection(row, printable(image_id), fault.reason, fault.detail)
            return
        for text in captions:
            yield SourceSample(row, image_id, (picture.absolute(),), (Turn("assistant", text),), id_is_given=False)


def has_sidecars(files: Sequence[Path]) -> bool:
    """Whether any of the files is a picture with a text beside it."""
    names = set(files)
    return any(not names.isdisjoint(_beside(path)) for path in files if path.suffix.lower() in PICTURE_SUFFIXES)


def files_below(folder: Path) -> tuple[Path, ...]:
    """Yield the files of a folder and its subfolders, sorted by name, without hidden ones."""
    return tuple(
        sorted(
            path
            for path in folder.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
        )
    )


def captions_of_text(text: str, all_lines: bool) -> list[str]:
    """Return the captions of a sidecar: its first line that is not blank, or all such lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if all_lines else lines[:1]


def _beside(picture: Path) -> list[Path]:
    return [picture.with_suffix(suffix) for suffix in TEXT_SUFFIXES]


def _read_text(file: Path) -> str:
    if file.stat().st_size > MAX_TEXT_BYTES:
        raise RowError("caption_too_long", f"{file} is larger than {MAX_TEXT_BYTES} bytes.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("bad_encoding", f"{file} is not UTF-8: {error}.") from error
