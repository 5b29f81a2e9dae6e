"""The image store: every picture once, by content, and a handle that reads pictures lazily.

    <root>/files/<sha256><suffix>                  the original bytes, never re-encoded
    <root>/manifest.csv/<version>/manifest.csv     which pictures a version holds
    <root>/manifest.csv/<version>/looks.npy        their difference hashes, so that no later step decodes them again

All versions share the files, which are only added. A referred picture has the same id, hash and content path, but its
bytes stay in the user's file, whose place and time of change the manifest keeps. Knows nothing of rows or captions.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.storage import file_sha256, move
from qwen_vl_lora.samples.image_files import LOOK_BYTES, open_image
from qwen_vl_lora.samples.looks import Looks
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import spreadsheet_cell, text_of_cell

if TYPE_CHECKING:
    from PIL import Image

MANIFEST_COLUMNS = ("id", "sha256", "path", "width", "height", "bytes")
REFERENCE_COLUMNS = (*MANIFEST_COLUMNS, "source", "modified")
"""Of a manifest with referred pictures."""

LOOKS_FILE = "looks.npy"
_REMEDY = "Run `kedro run --pipeline data_engineering` again: it restores the file from the source."


def files_folder(manifest: Path) -> Path:
    """The folder of the bytes, from the path that the catalog gives the manifests."""
    return manifest.parent / "files"


class ImageEntry(NamedTuple):
    """One line of the manifest: an id and the picture it names. A picture under two ids has two lines.

    Attributes:
        folder: folder of the file, relative to the project root, with forward slashes; shared by all entries.
        suffix: with the dot.
        width, height: pixels, after the EXIF orientation was applied.
        bytes: size of the file.
        source: absolute path of the user's file, if the picture is referred to and not stored.
        modified: time of the last change of that file, in nanoseconds.
    """

    id: str
    sha256: str
    folder: str
    suffix: str
    width: int
    height: int
    bytes: int
    source: str = ""
    modified: int = 0

    @property
    def path(self) -> str:
        """The stable content path, relative to the project root, as in conversations and tables."""
        return f"{self.folder}/{self.sha256}{self.suffix}"

    @property
    def file_name(self) -> str:
        """File name below `files/`."""
        return f"{self.sha256}{self.suffix}"


class ImageStore:
    """The pictures of one version: facts in memory, bytes on demand.

    Iterates over distinct pictures in the order of their first occurrence in the source.
    """

    def __init__(
        self, files: Path, entries: Sequence[ImageEntry], looks: Looks | Path, published: Path | None = None
    ) -> None:
        """`files` is the folder of the bytes; `looks` a difference hash for each distinct picture, or their file.

        For staged pictures, `published` is the folder that the paths of the entries name.
        """
        self.files = files
        self.published = published or files
        self.entries = entries
        self._looks = looks
        self._by_sha256: dict[str, ImageEntry] = {}
        for entry in entries:
            self._by_sha256.setdefault(entry.sha256, entry)
        self._by_id: dict[str, ImageEntry] | None = None

    def __len__(self) -> int:
        return len(self._by_sha256)

    def __iter__(self) -> Iterator[ImageEntry]:
        return iter(self._by_sha256.values())

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._by_sha256

    def __repr__(self) -> str:
        return f"ImageStore({len(self)} images in {self.files})"

    def by_sha256(self, sha256: str) -> ImageEntry:
        """Raises: DataFormatError when the version does not contain it."""
        return self._require(self._by_sha256.get(sha256), f"picture with sha256 {sha256!r}")

    def by_path(self, path: str) -> ImageEntry:
        """Return the entry for a content path of a conversation or table.

        Only the file name, the hash of the content, is compared: data folders may have been moved or copied.

        Raises:
            DataFormatError: when the version does not contain it.
        """
        sha256 = path.rpartition("/")[2].partition(".")[0]
        return self._require(self._by_sha256.get(sha256), f"image {path!r}")

    def by_id(self, image_id: str) -> ImageEntry:
        """Raises: DataFormatError when the version does not contain it."""
        if self._by_id is None:
            self._by_id = {entry.id: entry for entry in self.entries}
        return self._require(self._by_id.get(image_id), f"picture with id {image_id!r}")

    def file(self, sha256: str) -> Path:
        """Return the file of a picture: in the store, or the user's own."""
        entry = self.by_sha256(sha256)
        return Path(entry.source) if entry.source else self.files / entry.file_name

    def read_bytes(self, sha256: str) -> bytes:
        """Return the original bytes, hashed again so that an altered file is never used.

        Raises:
            MissingArtifactError: when the file does not exist.
            DataFormatError: when its content no longer matches its name.
        """
        file = self.file(sha256)
        refers = bool(self.by_sha256(sha256).source)
        if refers and not file.is_file():  # nor is a pipe read, which would never end
            raise _lost(file)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise MissingArtifactError(f"The picture {file} is missing. {_REMEDY}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            if refers:
                raise _changed(file)
            raise DataFormatError(f"The picture {file} was altered: its name is no longer its sha256. {_REMEDY}")
        return data

    def open(self, sha256: str) -> Image.Image:
        """Return the picture for the model: upright, RGB, transparent parts white."""
        data = self.read_bytes(sha256)
        try:
            entry = self.by_sha256(sha256)
            return open_image(data, max_pixels=entry.width * entry.height)
        except RowError as fault:
            raise DataFormatError(f"{self.file(sha256)}: {fault.detail}") from fault

    def verify(self) -> None:
        """Read and hash every picture.

        Raises:
            MissingArtifactError, DataFormatError: for the first picture that is missing or altered.
        """
        for entry in self:
            self.read_bytes(entry.sha256)

    @property
    def looks(self) -> Looks:
        """Difference hashes in the order of iteration. Read at the first use, because only the split needs them."""
        if isinstance(self._looks, Path):
            self._looks = _read_looks(self._looks, len(self))
        return self._looks

    def _require(self, entry: ImageEntry | None, what: str) -> ImageEntry:
        if entry is None:
            raise DataFormatError(
                f"The {what} is not among the {len(self)} pictures of this version in {self.files}. "
                "Use `images` and conversations of one data run, or run data_engineering again."
            )
        return entry


def require_unchanged(entry: ImageEntry) -> None:
    """Check a referred picture. It is only hashed again if the size or the time of its file changed.

    Raises:
        MissingArtifactError: when its file does not exist.
        DataFormatError: when its file has other bytes.
    """
    file = Path(entry.source)
    if not file.is_file():
        raise _lost(file)
    facts = file.stat()
    if (facts.st_size, facts.st_mtime_ns) == (entry.bytes, entry.modified):
        return
    if facts.st_size != entry.bytes or file_sha256(file) != entry.sha256:
        raise _changed(file)


def _lost(file: Path) -> MissingArtifactError:
    return MissingArtifactError(
        f"The picture {file} is missing; image.storage: reference left it where it was. Put it back, "
        "or run data_engineering again on rows without it."
    )


def _changed(file: Path) -> DataFormatError:
    return DataFormatError(
        f"The picture {file} has other bytes than when data_engineering read it; image.storage: reference left it "
        "where it was. Restore it, or run data_engineering again."
    )


def publish_files(staged: ImageStore, files: Path) -> None:
    """Move staged bytes into the store. Existing files are kept, because their name is the hash of their content.

    Raises:
        DataFormatError: when a picture is neither staged nor in the store, or a referred one changed.
    """
    files.mkdir(parents=True, exist_ok=True)
    for entry in staged:
        if entry.source:
            try:
                require_unchanged(entry)
            except MissingArtifactError as error:  # not as it is, for the reason below
                raise DataFormatError(str(error)) from error
            continue
        name = entry.file_name
        try:
            move(staged.files / name, files / name)
        except FileNotFoundError as error:
            # Not MissingArtifactError: Kedro gives a wrong explanation for a FileNotFoundError in a save.
            if not _has_size(files / name, entry.bytes):
                raise DataFormatError(
                    f"The picture {name} is neither staged in {staged.files} nor stored in {files}: "
                    "it was removed during the run. Run again."
                ) from error


def write_manifest(store: ImageStore, file: Path) -> None:
    """Write the manifest, and the difference hashes beside it."""
    import numpy as np

    np.save(file.with_name(LOOKS_FILE), store.looks, allow_pickle=False)
    columns = REFERENCE_COLUMNS if any(entry.source for entry in store.entries) else MANIFEST_COLUMNS
    with file.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(columns)
        for entry in store.entries:
            row = (spreadsheet_cell(entry.id), entry.sha256, entry.path, entry.width, entry.height, entry.bytes)
            writer.writerow(row if columns is MANIFEST_COLUMNS else (*row, entry.source, entry.modified))


def read_manifest(file: Path, files: Path) -> ImageStore:
    """Read the handle of one version, whose bytes are in `files`.

    Raises:
        MissingArtifactError: when there is no manifest.
        DataFormatError: when the file is not a manifest.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines)
            if tuple(next(rows, ())) not in (MANIFEST_COLUMNS, REFERENCE_COLUMNS):
                raise ValueError(f"its columns must be {', '.join(MANIFEST_COLUMNS)}")
            entries = list(_read_entries(rows))
    except FileNotFoundError as error:
        raise MissingArtifactError(f"The manifest {file} is missing. {_REMEDY}") from error
    except (ValueError, csv.Error) as error:
        raise DataFormatError(f"{file} is not a manifest of images: {error}. {_REMEDY}") from error
    return ImageStore(files, entries, file.with_name(LOOKS_FILE))


def _read_entries(rows: Iterable[list[str]]) -> Iterator[ImageEntry]:
    texts: dict[str, str] = {}  # folders, suffixes and sizes repeat: keep one object each
    pixels: dict[str, int] = {}
    for image_id, sha256, path, width, height, size, *reference in rows:
        folder, _, name = path.rpartition("/")
        suffix = name[len(sha256) :]
        if not name.startswith(sha256):
            raise ValueError(f"the path {path!r} does not name its sha256 {sha256!r}")
        for length in (width, height):
            if length not in pixels:
                pixels[length] = int(length)
        yield ImageEntry(
            text_of_cell(image_id),
            sha256,
            texts.setdefault(folder, folder),
            texts.setdefault(suffix, suffix),
            pixels[width],
            pixels[height],
            int(size),
            *((reference[0], int(reference[1])) if reference else ()),
        )


def _read_looks(file: Path, num_images: int) -> Looks:
    import numpy as np

    try:
        looks: Looks = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{file} is missing. {_REMEDY}") from error
    except (ValueError, EOFError) as error:
        raise DataFormatError(f"{file} does not contain difference hashes: {error}. {_REMEDY}") from error
    if looks.dtype != np.uint64 or looks.shape != (num_images, LOOK_BYTES // 8):
        raise DataFormatError(
            f"{file} must contain {LOOK_BYTES} bytes for each of {num_images} pictures; "
            f"got {looks.shape} of {looks.dtype}. {_REMEDY}"
        )
    return looks


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
