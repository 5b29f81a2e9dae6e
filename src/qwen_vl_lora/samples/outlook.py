"""What a source would become, looked at before anything is collected: texts for real, pictures by their headers.

Nothing is decoded, fetched or written. Pictures of files are told apart by their paths, so the same picture under two
paths counts twice here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from qwen_vl_lora.hub.addresses import address_of_path, path_of_address
from qwen_vl_lora.parameters import CaptionsParameters, ImageParameters, PromptParameters
from qwen_vl_lora.samples.collection import take_rows
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.image_files import measure_image
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from qwen_vl_lora.samples.turns import clean_turns

TYPICAL_CAPTION = "A man in a red jacket rides a horse along the beach."
"""Of 11 words, as COCO's captions have on average (10.5)."""


class Outlook(NamedTuple):
    """Conversations and pictures as data_engineering would make them, and how many rows it would reject."""

    conversations: list[dict[str, Any]]
    images: ImageStore
    rejected: int


def look_ahead(
    source: Iterable[SourceSample | Rejection],
    captions: CaptionsParameters,
    image: ImageParameters,
    prompt: PromptParameters,
) -> Outlook:
    """Read the rows of a source that `captions` asks for."""
    entries: dict[str, ImageEntry] = {}
    samples: list[dict[str, Any]] = []
    rejected = 0
    for row in take_rows(source, captions):
        if isinstance(row, Rejection):
            rejected += 1
            continue
        try:
            turns = clean_turns(row.turns, len(row.images), captions.collapse_whitespace)
            pictures = [_entry(row.id, picture, image) for picture in row.images]
        except (OSError, ValueError):  # a RowError is one, and a name that no file can have
            rejected += 1
            continue
        entries.update((picture.sha256, picture) for picture in pictures)
        samples.append(
            {
                "row": row.row,
                "id": row.id,
                "images": [picture.sha256 for picture in pictures],
                "turns": [{"role": turn.role, "text": turn.text} for turn in turns],
            }
        )
    images = ImageStore(Path(), list(entries.values()), Path())
    return Outlook(build_conversations(samples, images, prompt), images, rejected)


def typical_captions() -> Iterator[SourceSample]:
    """Rows without end that stand for a source which is not on this machine: one caption of each picture."""
    for number, caption in enumerate(repeat(TYPICAL_CAPTION), start=1):
        name = f"picture_{number:06d}"
        yield SourceSample(number, name, (path_of_address(f"https://{name}"),), (Turn("assistant", caption),))


def _entry(image_id: str, picture: bytes | Path, image: ImageParameters) -> ImageEntry:
    name = picture if isinstance(picture, bytes) else str(picture).encode()
    width, height = _size(picture, image)
    return ImageEntry(image_id, hashlib.sha256(name).hexdigest(), "source", "", width, height, 0)


def _size(picture: bytes | Path, image: ImageParameters) -> tuple[int, int]:
    """Pixels by the header; where every picture gets one size, or an address is not fetched, any will do."""
    if isinstance(picture, Path) and address_of_path(str(picture)) is not None:
        side = int((image.max_pixels or 1) ** 0.5)
        return side, side
    if image.resized_height is not None:
        if isinstance(picture, Path):
            picture.stat()
        return image.resized_width or 1, image.resized_height
    with picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture) as opened:
        return measure_image(opened, image)
