"""Captioned pictures from a ModelScope hub as a read-only catalog entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.datasets.sources import SourceDataset
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.hub.fetching import Fetcher
from qwen_vl_lora.hub.repositories import hub_config, parse_repository
from qwen_vl_lora.hub.tables import HubTable
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.records import Address, Reference, Rejection, Row, SourceSample, Turn
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.texts import printable


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called."""

    id: str
    caption: str
    image: str


@dataclass(frozen=True)
class HubCaptions(Source):
    """The rows of a table as samples, one for each caption. Pictures are fetched when a row is taken."""

    table: HubTable
    columns: Columns
    image_hosts: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        return False

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where pictures may lie that a table brought along: the client's cache."""
        return (self.table.cache,)

    def fetcher(self, image: ImageParameters) -> Fetcher:
        """Fetches from the hub itself and from the hosts that the catalog entry names."""
        return Fetcher(
            self.image_hosts,
            image.url_timeout,
            image.url_max_bytes,
            trusted_origins=[str(hub_config().endpoint)],
        )

    def __iter__(self) -> Iterator[Row]:
        for number, row in enumerate(self.table.rows(self.columns.image), start=1):
            yield self._read(number, row)

    def _read(self, number: int, row: dict[str, Any]) -> Row:
        missing = [name for name in (self.columns.id, self.columns.caption) if name not in row]
        if missing:
            return Rejection(number, "", "missing_key", f"The row has no {' and no '.join(missing)}.")
        image_id, caption = str(row[self.columns.id]), row[self.columns.caption]
        if not isinstance(caption, str):
            return Rejection(number, printable(image_id), "empty_caption", f"The caption is {caption!r}.")
        image = _image_of(row[self.columns.image])
        if image is None:
            return Rejection(number, printable(image_id), "missing_image", "The row holds no picture.")
        return SourceSample(number, image_id, (image,), (Turn("assistant", caption),), form="coco")


class HubCaptionsDataset(SourceDataset):
    """A table of captioned pictures on ModelScope: a row for each caption.

    ```yaml
    captioned_images:
      type: qwen_vl_lora.datasets.hub.HubCaptionsDataset
      dataset: modelscope/coco_2014_caption@master
      subset: coco_2014_caption
      split: train
      columns: {id: image_id, caption: caption, image: image}
      image_hosts: [pictures.example.com]   # where the table's addresses may lead, besides the hub
      trust_remote_code: true               # your reason
    ```

    ```python
    next(iter(HubCaptionsDataset(dataset="owner/name", split="train", columns={...}).load()))
    ```
    """

    def __init__(
        self,
        *,
        dataset: str,
        split: str,
        columns: dict[str, str],
        subset: str | None = None,
        image_hosts: Sequence[str] = (),
        trust_remote_code: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.metadata = metadata
        self._dataset = dataset
        repository = parse_repository("dataset", dataset)
        if repository is None:
            raise DataFormatError(f"dataset: {dataset!r} must read owner/name or owner/name@revision.")
        if set(columns) != {"id", "caption", "image"}:
            raise DataFormatError(f"columns: id, caption and image are required; came {', '.join(sorted(columns))}.")
        table = HubTable(repository, subset, split, trust_remote_code)
        self._rows = HubCaptions(table, Columns(**columns), tuple(image_hosts))

    def load(self) -> HubCaptions:
        return self._rows

    def check(self) -> None:
        """Refuse before any node runs when the hub cannot be reached."""
        self._rows.table.check()

    def needs_network(self) -> bool:
        """Whether a load, and so a check, asks the hub."""
        return True

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        table = self._rows.table
        return {"dataset": self._dataset, "subset": table.subset, "split": table.split}


def _image_of(value: Any) -> Reference | None:
    """A picture as a table stores it: bytes, or the path or address of a file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        return None
    return Address(value) if value.lower().startswith(("http://", "https://")) else Path(value)
