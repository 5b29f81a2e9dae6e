"""Previews a source before collection: texts are checked fully, pictures by their headers.

Nothing is decoded, fetched or written. Files are distinguished by their paths, so the same picture under two
paths counts twice here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vl_lora.parameters import CaptionsParameters, ImageParameters, PromptParameters
from qwen_vl_lora.samples.collection import collapses_whitespace, take_rows
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.image_files import measure_image
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.records import Address, Reference, Rejection, Row, SourceSample, Turn
from qwen_vl_lora.samples.source import GivenRows, Reading, Source, as_source
from qwen_vl_lora.samples.turns import clean_turns

TYPICAL_CAPTION = "A man in a red jacket rides a horse along the beach."
"""A caption of 11 words; COCO's captions have 10.5 on average."""


class Outlook(NamedTuple):
    """Conversations and pictures that data_engineering would make, and the number of rows that it would reject."""

    conversations: list[dict[str, Any]]
    images: ImageStore
    rejected: int


def look_ahead(
    source: Iterable[Row],
    captions: CaptionsParameters,
    image: ImageParameters,
    prompt: PromptParameters,
    project: Path = Path(),
) -> Outlook:
    """Read the rows of a source that `captions` selects; a relative path of `captions.exclude` starts at `project`."""
    entries: dict[str, ImageEntry] = {}
    samples: list[dict[str, Any]] = []
    rejected = 0
    for row in take_rows(as_source(source).read_as(Reading.of(captions, image)), captions, project):
        if isinstance(row, Rejection):
            rejected += 1
            continue
        try:
            turns = clean_turns(
                row.turns,
                len(row.images),
                collapse_whitespace=collapses_whitespace(row.form, captions),
                keep_nothing_words=captions.nothing_words == "keep",
            )
            pictures = [_entry(row.id, picture, image) for picture in row.images]
        except (OSError, ValueError):  # ValueError: a RowError, or an invalid file name
            rejected += 1
            continue
        entries.update((picture.sha256, picture) for picture in pictures)
        samples.append(
            {
                "row": row.row,
                "id": row.id,
                "images": [picture.sha256 for picture in pictures],
                "turns": [{"role": turn.role, "text": turn.text} for turn in turns],
                **({} if row.split is None else {"split": row.split}),
            }
        )
    images = ImageStore(Path(), list(entries.values()), Path())
    return Outlook(build_conversations(samples, images, prompt), images, rejected)


def typical_captions() -> Source:
    """Yield endless rows in place of a source that is not on this machine: one caption for each picture."""
    return GivenRows(_typical_rows())


def _typical_rows() -> Iterator[SourceSample]:
    for number, caption in enumerate(repeat(TYPICAL_CAPTION), start=1):
        name = f"picture_{number:06d}"
        yield SourceSample(number, name, (Address(f"https://{name}"),), (Turn("assistant", caption),))


def _entry(image_id: str, picture: Reference, image: ImageParameters) -> ImageEntry:
    name = picture if isinstance(picture, bytes) else str(picture).encode(errors="surrogateescape")
    width, height = _size(picture, image)
    return ImageEntry(image_id, hashlib.sha256(name).hexdigest(), "source", "", width, height, 0)


def _size(picture: Reference, image: ImageParameters) -> tuple[int, int]:
    """Return width and height from the header; an arbitrary size if all are resized alike, or for a URL."""
    if isinstance(picture, Address):
        side = int((image.max_pixels or 1) ** 0.5)
        return side, side
    if image.resized_height is not None:
        if isinstance(picture, Path):
            picture.stat()
        return image.resized_width or 1, image.resized_height
    with picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture) as opened:
        return measure_image(opened, image)
