"""The default `captioned_images`: drawn pictures with terse captions."""

from __future__ import annotations

import random
from collections.abc import Iterator

from qwen_vl_lora.samples.records import SourceSample, Turn
from qwen_vl_lora.tiny.drawing import draw_picture, encode_png
from qwen_vl_lora.tiny.language import short_captions
from qwen_vl_lora.tiny.partitions import Partition, draw_distinct_scenes

SHARE_BY_NUM_CAPTIONS = {1: 0.72, 2: 0.24, 3: 0.04}
"""As in COCO an image may have several captions. Most have only the canonical one."""


def draw_captioned_scenes(num_images: int, seed: int) -> Iterator[SourceSample]:
    """Yield one sample per caption, captions of an image one after the other.

    All scenes are of the fine-tuning partition, and no two have the same description, so
    a split by image is also a split by description.
    """
    rng = random.Random(f"captioned scenes/{seed}")
    row = 0
    scenes = draw_distinct_scenes(Partition.FINE_TUNING, rng, num_images)
    for number, scene in enumerate(scenes, start=1):
        png = encode_png(draw_picture(scene))
        for caption in short_captions(scene)[: _num_captions(rng)]:
            row += 1
            yield SourceSample(row=row, id=f"scene_{number:04d}", images=(png,), turns=(Turn("assistant", caption),))


def _num_captions(rng: random.Random) -> int:
    return rng.choices(tuple(SHARE_BY_NUM_CAPTIONS), tuple(SHARE_BY_NUM_CAPTIONS.values()))[0]
