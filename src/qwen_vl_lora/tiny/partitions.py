"""A split of scenes by their description, not by seed or picture.

Two pictures with the same description are always in the same partition, so no held-out
content occurs elsewhere under another seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from enum import Enum

from qwen_vl_lora.tiny.drawing import Scene, random_scene
from qwen_vl_lora.tiny.language import short_captions

_NUM_BUCKETS = 10


class Partition(Enum):
    """Buckets of descriptions: seven tenths, two tenths and one tenth of all."""

    PRETRAINING = range(7)
    FINE_TUNING = range(7, 9)
    HELD_OUT = range(9, 10)


def describe(scene: Scene) -> str:
    """Return the content that decides the partition: background, things in reading order, relation.

    Cells and jitter are left out on purpose: scenes that differ only in layout share a
    partition, so partitions differ by more than the places that long answers name.
    """
    return short_captions(scene)[0]


def partition_of(scene: Scene) -> Partition:
    """Return the one partition to which the scene's description belongs."""
    digest = hashlib.sha256(describe(scene).encode()).digest()
    bucket = int.from_bytes(digest[:8]) % _NUM_BUCKETS
    return next(partition for partition in Partition if bucket in partition.value)


def draw_scenes(partition: Partition, rng: random.Random, num_objects: int | None = None) -> Iterator[Scene]:
    """Yield scenes of one partition without end; descriptions may repeat."""
    while True:
        scene = random_scene(rng, num_objects)
        if partition_of(scene) is partition:
            yield scene


def draw_distinct_scenes(partition: Partition, rng: random.Random, count: int) -> Iterator[Scene]:
    """Yield `count` scenes of one partition, no two with the same description."""
    seen: set[str] = set()
    for scene in draw_scenes(partition, rng):
        if len(seen) == count:
            return
        if (description := describe(scene)) not in seen:
            seen.add(description)
            yield scene
