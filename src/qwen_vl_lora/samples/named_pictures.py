"""Pictures that a user names, independent of a data run: a folder, a table of paths, single files.

The files are not copied; they are read when needed. An unusable picture stays in the list with its
reason. Knows nothing of captions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, ParameterError
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.runs.given_command import repeated
from qwen_vl_lora.samples.fields import find_fields
from qwen_vl_lora.samples.image_files import inspect_image
from qwen_vl_lora.samples.image_stage import read_allowed_file, readable_roots
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.looks import stack_looks
from qwen_vl_lora.samples.records import Address, Reason, RowError
from qwen_vl_lora.samples.references import Place
from qwen_vl_lora.samples.source import AS_USUAL
from qwen_vl_lora.samples.tables import first_line, read_table, require_text

_READ = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp")
_REFUSED = (".tif", ".tiff", ".dng", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".ico", ".psd", ".ppm", ".qoi")
PICTURE_SUFFIXES = frozenset((*_READ, *_REFUSED))
"""Endings of pictures in a folder. Unsupported formats get a reason, so that no picture disappears silently."""


@dataclass(frozen=True, slots=True)
class NamedPicture:
    """A picture as the user named it.

    Attributes:
        path: as written in the table, or the file's path; bytes that are not UTF-8 as \\udc….
        sha256: of its bytes; None if it is unusable.
        reason: why it is unusable, as `word: sentence`; else empty.
        file: its file; None if it is unusable, or its bytes are in a table.
    """

    path: str
    sha256: str | None
    reason: str = ""
    file: Path | None = None


class LoosePictures(ImageStore):
    """The user's picture files by the sha256 of their bytes."""

    def __init__(self, entries: Sequence[ImageEntry], sources: Mapping[str, bytes | Path]) -> None:
        """`sources` maps each sha256 to its file, or to the bytes if a table contains them."""
        super().__init__(Path(), entries, stack_looks({}))
        self.sources = sources

    def read_bytes(self, sha256: str) -> bytes:
        """Raises: DataFormatError when the file changed since it was checked."""
        source = self.sources[sha256]
        if isinstance(source, bytes):
            return source
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataFormatError(f"The picture {source} changed while it was captioned. Repeat the command.")
        return data


@dataclass(frozen=True)
class Gathered:
    """Pictures in the order in which they were named, and usable ones by content."""

    named: list[NamedPicture]
    images: LoosePictures

    @property
    def usable(self) -> list[str]:
        """sha256 of each distinct usable picture, in order."""
        return list(dict.fromkeys(picture.sha256 for picture in self.named if picture.sha256))


def named_place(images: str | None) -> Path:
    """Return the place that `inference.images` names.

    Raises:
        ParameterError: if it names none.
        MissingArtifactError: if it does not exist.
    """
    if images is None:
        raise ParameterError(
            "inference.images is not set. Give a folder, a picture, or a CSV with the column image_path: "
            + repeated({"inference.images": "path/to/folder"})
        )
    place = Path(images).expanduser()
    if not place.exists():
        raise MissingArtifactError(_not_found(place))
    return place


def gather_pictures(places: Sequence[Path], image: ImageParameters, *, recursive: bool) -> Gathered:
    """Check the pictures that `places` name: folders, files, or a CSV with the column image_path.

    Folders and files that are named here may be read. Files that they link to or name must be inside them, beside the
    table, in the project, or below `image.allowed_roots`. A place without pictures, among several, gets a reason.

    Raises:
        MissingArtifactError: when a single place does not exist or contains no picture.
        DataFormatError: when a single table has no column image_path, or cannot be read to its end.
    """
    checked = _Checked(image)
    for place in places:
        before = len(checked.named)
        try:
            for shown, source, roots in _find_pictures(place, image, recursive=recursive):
                checked.add(shown, source, roots)
            if len(checked.named) == before:
                raise MissingArtifactError(
                    f"No pictures found in {place}. Expected files that end with {', '.join(_READ)}"
                    f"{'' if recursive else '; inference.recursive: true also searches its subfolders'}."
                )
        except (MissingArtifactError, DataFormatError) as fault:
            if len(places) == 1:
                raise
            reason: Reason = "missing_image" if isinstance(fault, MissingArtifactError) else "malformed_row"
            checked.add(place.as_posix(), RowError(reason, str(fault)), ())
    return Gathered(checked.named, LoosePictures(list(checked.entries.values()), checked.sources))


def _find_pictures(
    place: Path, image: ImageParameters, *, recursive: bool
) -> Iterator[tuple[str, bytes | Path | RowError, tuple[str, ...]]]:
    """Yield the name of each picture, its place, and the folders that may be read for it."""
    if place.is_dir():
        roots = readable_roots(Path.cwd(), [place], image)
        for path in sorted(place.rglob("*") if recursive else place.iterdir()):
            if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("."):
                yield path.as_posix(), path, roots
    elif place.suffix.lower() in (".csv", ".tsv") and place.is_file():
        folder = place.absolute().parent
        roots = readable_roots(Path.cwd(), [folder], image)
        with place.open("rb") as opened:
            require_text(opened, place)
            lines = read_table(opened, place, lambda names: find_fields(names, AS_USUAL).image is not None)
            header = cast(list[str], next(lines)[1])
            image_column = find_fields(header, AS_USUAL).image
            if image_column is None:
                raise DataFormatError(
                    f"{place} needs a column for the picture, such as image_path; its first line has: "
                    f"{first_line(header)}. The first line names the columns, separated by commas."
                )
            for _, cells in lines:
                yield *_picture_of(cells, header.index(image_column), Place(folder)), roots
    elif place.exists():
        yield place.as_posix(), place, (str(Path(os.path.realpath(place)).parent),)
    else:
        raise MissingArtifactError(_not_found(place))


def _not_found(place: Path) -> str:
    return (
        f"Pictures not found: {place}. Expected a folder, a picture, or a CSV with the column image_path; "
        f"relative paths start at {Path.cwd()}."
    )


def _picture_of(cells: list[str] | RowError, column: int, place: Place) -> tuple[str, bytes | Path | RowError]:
    if isinstance(cells, RowError):
        return "", cells
    reference = cells[column].strip()
    try:
        picture = place.resolve(reference)
    except RowError as fault:
        return reference, fault
    assert not isinstance(picture, Address)  # this place reads no URLs
    return reference, picture


class _Checked:
    """The pictures checked so far; each distinct content is decoded once."""

    def __init__(self, image: ImageParameters) -> None:
        self._image = image
        self.named: list[NamedPicture] = []
        self.entries: dict[str, ImageEntry] = {}
        self.sources: dict[str, bytes | Path] = {}

    def add(self, shown: str, source: bytes | Path | RowError, roots: tuple[str, ...]) -> None:
        shown = shown.encode("utf-8", errors="backslashreplace").decode("utf-8")  # a file name may be any bytes
        try:
            sha256 = self._check(source, roots)
            self.named.append(NamedPicture(shown, sha256, file=source if isinstance(source, Path) else None))
        except RowError as fault:
            self.named.append(NamedPicture(shown, None, f"{fault.reason}: {fault.detail}"))

    def _check(self, source: bytes | Path | RowError, roots: tuple[str, ...]) -> str:
        if isinstance(source, RowError):
            raise source
        data = source if isinstance(source, bytes) else read_allowed_file(str(source), roots)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in self.entries:
            facts = inspect_image(data, self._image)
            self.entries[sha256] = ImageEntry(sha256, sha256, "", facts.suffix, facts.width, facts.height, len(data))
            self.sources[sha256] = source
        return sha256
