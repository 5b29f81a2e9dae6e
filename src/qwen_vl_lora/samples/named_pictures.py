"""Pictures that a user names, outside of any data run: a folder, a table of paths, single files.

They stay where they are and are read when they are needed. One that cannot be used is kept in the
list with its reason. Knows nothing of captions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.image_files import inspect_image
from qwen_vl_lora.samples.image_stage import read_allowed_file, readable_roots
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.looks import stack_looks
from qwen_vl_lora.samples.records import Reason, RowError
from qwen_vl_lora.samples.references import resolve_reference
from qwen_vl_lora.samples.tables import read_table, require_text

_READ = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp")
_REFUSED = (".tif", ".tiff", ".dng", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".ico", ".psd", ".ppm", ".qoi")
PICTURE_SUFFIXES = frozenset((*_READ, *_REFUSED))
"""What counts as a picture in a folder. Forms that are not read get a reason: leaving them out would look like loss."""


@dataclass(frozen=True, slots=True)
class NamedPicture:
    """A picture as the user named it.

    Attributes:
        path: as it stands in the table, or the file's path; bytes that are not UTF-8 as \\udc….
        sha256: of its bytes; None when it cannot be used.
        reason: why not, as `word: sentence`; empty when it can.
    """

    path: str
    sha256: str | None
    reason: str = ""


class LoosePictures(ImageStore):
    """Pictures where the user keeps them, by the sha256 of their bytes."""

    def __init__(self, entries: Sequence[ImageEntry], sources: Mapping[str, bytes | Path]) -> None:
        """`sources` holds the file of each sha256, or its bytes where a table holds them itself."""
        super().__init__(Path(), entries, stack_looks({}))
        self.sources = sources

    def read_bytes(self, sha256: str) -> bytes:
        """Raises: DataFormatError when the file changed since it was checked."""
        source = self.sources[sha256]
        if isinstance(source, bytes):
            return source
        data = source.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataFormatError(f"The picture {source} changed while it was captioned. Run again.")
        return data


@dataclass(frozen=True)
class Gathered:
    """Pictures in the order in which they were named, and the usable ones by content."""

    named: list[NamedPicture]
    images: LoosePictures

    @property
    def usable(self) -> list[str]:
        """sha256 of each distinct usable picture, in order."""
        return list(dict.fromkeys(picture.sha256 for picture in self.named if picture.sha256))


def gather_pictures(places: Sequence[Path], image: ImageParameters, *, recursive: bool) -> Gathered:
    """Check the pictures that `places` name: folders, files, or a CSV with the column image_path.

    Folders and files that are named here may be read; what they link to or name must lie in them, beside the table,
    in the project, or below `image.allowed_roots`. One of several places that gives nothing is kept with its reason.

    Raises:
        MissingArtifactError: when a single place is not there or holds no picture at all.
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
                    f"{place} holds no picture. Required: files that end with {', '.join(_READ)}"
                    f"{'' if recursive else '; inference.recursive: true looks into its folders too'}."
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
    """What each picture is called, where it is, and the folders that may be read for it."""
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
            for _, record in read_table(opened, place, ("image_path",)):
                yield *_picture_of(record, folder), roots
    elif place.exists():
        yield place.as_posix(), place, (str(Path(os.path.realpath(place)).parent),)
    else:
        raise MissingArtifactError(
            f"{place} is not there. Give a folder, a picture, or a CSV with the column image_path; "
            f"relative paths start at {Path.cwd()}."
        )


def _picture_of(record: dict[str, str] | RowError, folder: Path) -> tuple[str, bytes | Path | RowError]:
    if isinstance(record, RowError):
        return "", record
    reference = record["image_path"].strip()
    try:
        return reference, resolve_reference(reference, folder)
    except RowError as fault:
        return reference, fault


class _Checked:
    """Pictures checked so far; each distinct content is decoded once."""

    def __init__(self, image: ImageParameters) -> None:
        self._image = image
        self.named: list[NamedPicture] = []
        self.entries: dict[str, ImageEntry] = {}
        self.sources: dict[str, bytes | Path] = {}

    def add(self, shown: str, source: bytes | Path | RowError, roots: tuple[str, ...]) -> None:
        shown = shown.encode("utf-8", errors="backslashreplace").decode("utf-8")  # a file's name may be any bytes
        try:
            self.named.append(NamedPicture(shown, self._check(source, roots)))
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
