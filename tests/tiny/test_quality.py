"""What counts as right, what chance is, and what a swap is."""

from __future__ import annotations

import random

import pytest

from qwen_vl_lora.tiny.drawing import Thing, random_scene
from qwen_vl_lora.tiny.language import Attributes, short_captions, true_attributes
from qwen_vl_lora.tiny.quality import (
    attribute_accuracy,
    chance_accuracy,
    count_right,
    exact_share,
    held_out_scenes,
    swap_pairs,
    swapped_share,
)

RED_CIRCLE = Thing("big", "red", "circle")
BLUE_SQUARE = Thing("small", "blue", "square")
TRUE = Attributes("grey", (RED_CIRCLE, BLUE_SQUARE))


@pytest.mark.parametrize(
    ("said", "right", "total"),
    [
        (TRUE, 7, 7),
        (Attributes("pink", (RED_CIRCLE, BLUE_SQUARE)), 6, 7),
        (Attributes("grey", (RED_CIRCLE, Thing("big", "blue", "square"))), 6, 7),
        # Left out: all three attributes of the second are missing.
        (Attributes("grey", (RED_CIRCLE,)), 4, 7),
        # Too many: three more attributes were claimed than there are.
        (Attributes("grey", (RED_CIRCLE, BLUE_SQUARE, RED_CIRCLE)), 7, 10),
        # In the wrong order nothing of the two things agrees.
        (Attributes("grey", (BLUE_SQUARE, RED_CIRCLE)), 1, 7),
        (Attributes(None, ()), 0, 7),
    ],
)
def test_right_attributes_are_counted_by_place_in_order(said: Attributes, right: int, total: int) -> None:
    assert count_right(said, TRUE) == (right, total)


def test_true_captions_score_one() -> None:
    scenes = held_out_scenes(20, seed=3)
    captions = [short_captions(scene)[0] for scene in scenes]
    assert attribute_accuracy(captions, scenes) == exact_share(captions, scenes) == 1.0


def test_chance_is_the_written_down_value() -> None:
    # (1/4 + 3 (1/2 + 1/8 + 1/6)) / (1 + 3 * 3)
    assert chance_accuracy() == pytest.approx(0.2625)


def test_blind_guesses_do_not_beat_chance() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(5_000)]
    # Other scenes with the right number of objects, known for free.
    guesses = [short_captions(random_scene(rng, len(scene.objects)))[0] for scene in scenes]
    assert attribute_accuracy(guesses, scenes) == pytest.approx(chance_accuracy(), abs=0.01)


def test_swapping_exchanges_neighbours() -> None:
    assert swap_pairs(["a", "b", "c", "d", "e"]) == ["b", "a", "d", "c", "e"]


def test_a_pair_swaps_only_if_its_texts_differ_and_change_places() -> None:
    texts = ["a", "b", "c", "c", "e", "f"]
    assert swapped_share(texts, ["b", "a", "c", "c", "f", "x"]) == pytest.approx(1 / 3)


def test_held_out_scenes_follow_from_the_seed() -> None:
    assert held_out_scenes(5, seed=0) == held_out_scenes(5, seed=0) != held_out_scenes(5, seed=1)
    assert all(true_attributes(scene).things for scene in held_out_scenes(5, seed=0))
