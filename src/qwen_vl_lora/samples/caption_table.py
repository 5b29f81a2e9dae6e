"""The caption table: a row for each sample of one picture and one answer, made from `samples` as it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.samples.image_store import ImageStore

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("image_id", "image_path", "caption", "width", "height", "sha256")


@dataclass(frozen=True)
class CaptionTable:
    """Rows that can be read repeatedly and are never in memory together.

    Attributes:
        samples: of a collection.
        images: the pictures that they name.
        num_rows: how many samples are captions.
        has_carriage_return: whether a cell has one, which a CSV reader takes for the end of a line.
    """

    samples: Sequence[Mapping[str, Any]]
    images: ImageStore
    num_rows: int
    has_carriage_return: bool

    columns = COLUMNS

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[str, str, str, int, int, str]]:
        for sample, caption in captions_in(self.samples):
            entry = self.images.by_sha256(sample["images"][0])
            yield sample["image_ids"][0], entry.path, caption, entry.width, entry.height, entry.sha256

    def frame(self) -> pd.DataFrame:
        """Return the whole table in memory."""
        import pandas as pd

        types = dict.fromkeys(COLUMNS, "object") | {"width": "int64", "height": "int64"}
        return pd.DataFrame(list(self), columns=list(COLUMNS)).astype(types)


def captions_in(samples: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield each sample of one picture and one answer, with the answer."""
    for sample in samples:
        if len(sample["images"]) == 1:
            answers = [turn["text"] for turn in sample["turns"] if turn["role"] == "assistant"]
            if len(answers) == 1:
                yield sample, answers[0]
