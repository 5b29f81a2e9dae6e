"""The base class of all sources of captioned pictures: rows that can be read repeatedly, and what reading needs.

A new form of captions is a subclass. Nothing else in the project checks the kind of a source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self

from qwen_vl_lora.hub.fetching import Fetcher
from qwen_vl_lora.parameters import CaptionsParameters, ColumnsParameters, ImageParameters
from qwen_vl_lora.samples.records import Row


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Attributes:
        columns: names of columns or keys that the user gave.
        split_column: name of the column with the file's own split.
        read_addresses: accept https URLs as pictures; otherwise their rows are rejected.
        bucket: `s3://name` of the bucket that the rows come from; addresses of its objects are pictures.
        sidecar_lines: whether each line of a text beside a picture is a caption, or only the first.
    """

    columns: ColumnsParameters | None = None
    split_column: str | None = None
    read_addresses: bool = False
    sidecar_lines: Literal["first", "all"] = "first"
    bucket: str | None = None

    @classmethod
    def of(cls, captions: CaptionsParameters, image: ImageParameters) -> Reading:
        """Create it from the parameters."""
        return cls(captions.columns, captions.split_column, image.allow_urls, captions.sidecar_lines)

    @property
    def names_caption(self) -> bool:
        """Whether the user named the caption, which then is one even beside a question."""
        return self.columns is not None and self.columns.caption is not None


AS_USUAL = Reading()


def _is_here(file: Path) -> None:
    """Do nothing: a file on this machine needs no preparation."""


class Fetches(Protocol):
    """Fetches pictures by their address. Thread-safe."""

    def fetch(self, address: str) -> bytes:
        """Raises: FetchError with the reason."""


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Captioned pictures: a `SourceSample` or a `Rejection` for every row.

    If the whole source is unreadable, iterating raises `DataFormatError` or `MissingArtifactError`.
    """

    reading: Reading = AS_USUAL
    bring: Callable[[Path], None] = _is_here
    """Called with each file before it is opened, so that a data set on a hub can download it."""

    @abstractmethod
    def __iter__(self) -> Iterator[Row]: ...

    def __str__(self) -> str:
        return "the source"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that may always be read: those of the source's own files."""
        return ()

    @property
    def is_local(self) -> bool:
        """Whether reading all rows needs no download."""
        return True

    @property
    def is_quick(self) -> bool:
        """Whether reading all rows reads only texts, so that it can be done before a run."""
        return self.is_local

    def read_as(self, reading: Reading) -> Self:
        """Return the same source with another way of reading."""
        return replace(self, reading=reading)

    def brought_by(self, bring: Callable[[Path], None]) -> Self:
        """Return the same source, whose files `bring` prepares."""
        return replace(self, bring=bring)

    def check(self) -> None:  # noqa: B027 - files of this machine are checked when they are read
        """Raise, before a run begins, if files are not on this machine and cannot be downloaded.

        Raises:
            MissingArtifactError: within seconds.
        """

    def fetcher(self, image: ImageParameters) -> Fetches | None:
        """Return what fetches pictures by their address; None if none is fetched."""
        return Fetcher(image.url_hosts, image.url_timeout, image.url_max_bytes) if image.allow_urls else None


@dataclass(frozen=True)
class GivenRows(Source):
    """Rows given by the caller."""

    rows: Iterable[Row]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def as_source(rows: Iterable[Row]) -> Source:
    """Return a source for the value that `captioned_images` loaded."""
    return rows if isinstance(rows, Source) else GivenRows(rows)
