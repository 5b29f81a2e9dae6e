"""Captions say what the scene holds, and read back as it."""

from __future__ import annotations

import random

import pytest

from qwen_vl_lora.tiny.drawing import BACKGROUNDS, COLOURS, Placed, Scene, Thing, random_scene
from qwen_vl_lora.tiny.language import Attributes, place, read_attributes, relation, short_captions, true_attributes

RED_CIRCLE = Thing("big", "red", "circle")
BLUE_SQUARE = Thing("small", "blue", "square")
GREEN_STAR = Thing("small", "green", "star")


def placed(thing: Thing, row: int, column: int) -> Placed:
    return Placed(thing, row, column, shift=(0, 0))


def random_scenes(count: int) -> list[Scene]:
    rng = random.Random(11)
    return [random_scene(rng) for _ in range(count)]


def test_two_objects_are_joined_by_their_relation() -> None:
    scene = Scene("grey", (placed(RED_CIRCLE, 0, 2), placed(BLUE_SQUARE, 1, 0)))
    assert short_captions(scene)[0] == "big red circle above small blue square, on grey"


def test_two_objects_in_one_row_stand_left_and_right() -> None:
    scene = Scene("pink", (placed(RED_CIRCLE, 1, 0), placed(BLUE_SQUARE, 1, 2)))
    assert short_captions(scene)[0] == "big red circle left of small blue square, on pink"


def test_three_objects_are_a_list_in_reading_order() -> None:
    scene = Scene("teal", (placed(RED_CIRCLE, 0, 0), placed(BLUE_SQUARE, 1, 1), placed(GREEN_STAR, 2, 0)))
    assert short_captions(scene) == (
        "big red circle, small blue square, small green star, on teal",
        "big red circle, small blue square, small green star, all on teal",
        "big red circle, small blue square, small green star, teal background",
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0), (2, 2), "above"),
        ((2, 0), (1, 2), "below"),
        ((1, 0), (1, 1), "left of"),
        ((1, 2), (1, 1), "right of"),
    ],
)
def test_relation_puts_rows_before_columns(first: tuple[int, int], second: tuple[int, int], expected: str) -> None:
    assert relation(placed(RED_CIRCLE, *first), placed(BLUE_SQUARE, *second)) == expected


def test_short_captions_read_back_as_their_scene() -> None:
    for scene in random_scenes(500):
        for caption in short_captions(scene):
            assert read_attributes(caption) == true_attributes(scene)


def test_reading_ignores_case_and_repeats() -> None:
    text = "Big red circle. The big red circle is above the small blue square. The background is Pink."
    assert read_attributes(text) == Attributes("pink", (RED_CIRCLE, BLUE_SQUARE))


def test_reading_keeps_the_order_of_mention() -> None:
    assert read_attributes("small blue square, big red circle").things == (BLUE_SQUARE, RED_CIRCLE)


@pytest.mark.parametrize("text", ["", "a circle", "big circle red", "bigred circle", "greyish"])
def test_reading_finds_nothing_in_other_texts(text: str) -> None:
    assert read_attributes(text) == Attributes(None, ())


def test_no_word_is_both_background_and_colour() -> None:
    assert not set(BACKGROUNDS) & set(COLOURS)


def test_outer_cells_have_their_own_words_and_inner_ones_share_theirs() -> None:
    assert place(placed(RED_CIRCLE, 0, 0)) == "at the top left"
    assert place(placed(RED_CIRCLE, 3, 2)) == "at the bottom"
    assert place(placed(RED_CIRCLE, 1, 3)) == "on the right"
    assert place(placed(RED_CIRCLE, 1, 1)) == place(placed(RED_CIRCLE, 2, 2)) == "in the middle"
