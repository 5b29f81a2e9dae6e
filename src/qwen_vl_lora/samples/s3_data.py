"""Captions and pictures on S3. Files of captions, Parquet and tars are copied to this machine before they are read;
pictures that they name are read when their rows are checked, like those behind URLs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vl_lora.hub.fetching import FetchError
from qwen_vl_lora.hub.s3 import Bucket, parse_s3
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.folders import TAR_SUFFIXES, open_files
from qwen_vl_lora.samples.records import Address, Reference, Row, SourceSample
from qwen_vl_lora.samples.source import Fetches, Source
from qwen_vl_lora.samples.sources import CaptionsFile


@dataclass(frozen=True)
class S3Data(Source):
    """A file of captions, or all below a prefix of keys.

    Attributes:
        image_folder: where relative paths of pictures start, on this machine or below `bucket.folder`; None is the
            place of the file.
    """

    bucket: Bucket
    key: str
    image_folder: Path | None = None

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def folders(self) -> tuple[Path, ...]:
        own = self.bucket.folder
        return (own,) if self.image_folder is None else (self.image_folder.absolute(), own)

    @property
    def is_local(self) -> bool:
        return False

    def check(self) -> None:
        """Refuse a place that is not there, or cannot be reached."""
        self._open()

    def fetcher(self, image: ImageParameters) -> ObjectFetcher:
        return ObjectFetcher(super().fetcher(image), image.url_max_bytes)

    def __iter__(self) -> Iterator[Row]:
        for row in self._open().brought_by(self.bucket.bring).read_as(replace(self.reading, bucket=str(self.bucket))):
            if isinstance(row, SourceSample):
                row = replace(row, images=tuple(map(self._reference, row.images)))
            yield row

    def _reference(self, image: Reference) -> Reference:
        address = self.bucket.address(image) if isinstance(image, Path) else None
        return image if address is None else Address(address)

    def _open(self) -> Source:
        paths = self.bucket.list_files(self.key)
        root = self.bucket.folder / self.key
        folder = root.parent if paths == [root] else root
        for needed in (folder, self.image_folder):  # readers expect the folder of paths, which are only names here
            if needed is not None and needed.is_relative_to(self.bucket.folder):
                needed.mkdir(parents=True, exist_ok=True)
        is_table = root.suffix.lower() not in (".parquet", ".arrow") and not root.name.lower().endswith(TAR_SUFFIXES)
        if paths == [root] and is_table:
            return CaptionsFile(root, self.image_folder)
        return open_files(folder, sorted(paths), self.image_folder)


@dataclass(frozen=True)
class ObjectFetcher:
    """Reads pictures from S3, and those behind other URLs where `image.allow_urls` is set."""

    web: Fetches | None
    max_bytes: int

    def fetch(self, address: str) -> bytes:
        """Return the bytes behind an address.

        Raises:
            FetchError: with the reason.
        """
        place = parse_s3(address)
        if place is not None:
            return Bucket(place[0]).read(place[1], self.max_bytes)
        if self.web is None:
            raise FetchError("refused", "Fetching URLs is disabled: image.allow_urls is false.")
        return self.web.fetch(address)
