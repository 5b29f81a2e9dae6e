"""The split is by content: no description crosses it, whatever the seed."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice

import pytest

from qwen_vl_lora.tiny.dialogue import random_conversation
from qwen_vl_lora.tiny.drawing import Placed, Scene, random_scene
from qwen_vl_lora.tiny.language import read_attributes, true_attributes
from qwen_vl_lora.tiny.partitions import (
    Partition,
    describe,
    draw_distinct_scenes,
    draw_scenes,
    partition_of,
)
from qwen_vl_lora.tiny.quality import held_out_scenes
from qwen_vl_lora.tiny.source import draw_captioned_scenes


def pretraining_scenes(num_conversations: int) -> list[Scene]:
    rng = random.Random("any seed")
    return [scene for _ in range(num_conversations) for turn in random_conversation(rng) for scene in turn.pictures]


@pytest.mark.parametrize("num_conversations", [5_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_held_out_and_fine_tuning_descriptions_never_occur_in_pretraining(num_conversations: int) -> None:
    seen = {describe(scene) for scene in pretraining_scenes(num_conversations)}
    held_out = {describe(scene) for scene in held_out_scenes(2_000, seed=0)}
    fine_tuning = {sample.turns[0].text for sample in draw_captioned_scenes(2_000, seed=0)}
    assert not seen & held_out
    assert not seen & fine_tuning
    assert not held_out & fine_tuning


def test_every_scene_that_pretraining_draws_is_of_its_partition() -> None:
    assert {partition_of(scene) for scene in pretraining_scenes(2_000)} == {Partition.PRETRAINING}


def test_partitions_split_all_buckets_between_them() -> None:
    buckets = [bucket for partition in Partition for bucket in partition.value]
    assert sorted(buckets) == list(range(10))


def test_partition_follows_from_the_description_alone() -> None:
    rng = random.Random(5)
    for scene in (random_scene(rng) for _ in range(300)):
        moved = replace(scene, objects=tuple(shifted(placed) for placed in scene.objects))
        assert moved != scene
        assert describe(moved) == describe(scene)
        assert partition_of(moved) is partition_of(scene)


def shifted(placed: Placed) -> Placed:
    return replace(placed, shift=(placed.shift[0] + 1, placed.shift[1]))


def test_description_says_all_attributes() -> None:
    rng = random.Random(6)
    for scene in (random_scene(rng) for _ in range(300)):
        assert read_attributes(describe(scene)) == true_attributes(scene)


def test_partitions_get_seven_two_and_one_tenth() -> None:
    rng = random.Random(8)
    drawn = [partition_of(random_scene(rng)) for _ in range(10_000)]
    shares = [drawn.count(partition) / len(drawn) for partition in Partition]
    # Four standard deviations of a share of 0.7 in 10,000 draws are 0.018.
    assert all(abs(share - expected) < 0.02 for share, expected in zip(shares, (0.7, 0.2, 0.1), strict=True))


def test_draws_of_a_partition_stay_in_it() -> None:
    for partition in Partition:
        scenes = islice(draw_scenes(partition, random.Random(1), num_objects=2), 50)
        assert all(partition_of(scene) is partition and len(scene.objects) == 2 for scene in scenes)


def test_distinct_scenes_are_distinct_and_as_many_as_asked() -> None:
    scenes = list(draw_distinct_scenes(Partition.FINE_TUNING, random.Random(2), 1_000))
    assert len({describe(scene) for scene in scenes}) == len(scenes) == 1_000
