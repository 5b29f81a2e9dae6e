"""Image tokens learn the words of what they cover."""

from __future__ import annotations

import random

import pytest
import torch

from qwen_vl_lora.tiny.drawing import BACKGROUNDS, COLOURS, Placed, Scene, Thing, draw_picture, random_scene
from qwen_vl_lora.tiny.grounding import covered_words, word_targets

BIG_RED_CIRCLE = Thing("big", "red", "circle")
SCENE = Scene("grey", (Placed(BIG_RED_CIRCLE, row=3, column=2, shift=(0, 0)),))


def test_token_over_an_object_names_it_its_place_and_the_background() -> None:
    # Row by row of four: row 3, column 2 is the fifteenth.
    assert covered_words(SCENE)[14] == pytest.approx(
        {
            "grey": 1 / 6,
            "big": 1 / 6,
            "red": 1 / 6,
            "circle": 1 / 6,
            "bottom": 1 / 6,
            "middle": 1 / 12,
            "right": 1 / 12,
        }
    )


def test_tokens_away_from_objects_name_the_background() -> None:
    assert [words for number, words in enumerate(covered_words(SCENE)) if number != 14] == [{"grey": 1.0}] * 15


def test_each_cell_has_a_place_of_its_own() -> None:
    scenes = [
        Scene("grey", (Placed(BIG_RED_CIRCLE, row, column, shift=(0, 0)),)) for row in range(4) for column in range(4)
    ]
    places = [covered_words(scene)[number] for number, scene in enumerate(scenes)]
    assert len({tuple(sorted(words.items())) for words in places}) == 16


def test_targets_are_distributions_over_the_vocabulary() -> None:
    word_ids = {"grey": 0, "big": 1, "red": 2, "circle": 3, "bottom": 5, "middle": 6, "right": 7}
    targets = word_targets([SCENE, SCENE], word_ids, vocabulary=9)
    assert targets.shape == (2 * 16, 9)
    sixth, twelfth = 1 / 6, 1 / 12
    expected = torch.tensor([sixth, sixth, sixth, sixth, 0, sixth, twelfth, twelfth, 0])
    torch.testing.assert_close(targets[14], expected)
    torch.testing.assert_close(targets[16], torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0]))


def test_what_tokens_name_is_what_the_picture_shows() -> None:
    rng = random.Random(2)
    for scene in (random_scene(rng) for _ in range(100)):
        picture = draw_picture(scene)
        for number, words in enumerate(covered_words(scene)):
            left, top = 28 * (number % 4), 28 * (number // 4)
            colours = {colour for _, colour in picture.crop((left, top, left + 28, top + 28)).getcolors()}
            named = {word for word, colour in (BACKGROUNDS | COLOURS).items() if colour in colours}
            assert named == words.keys() & (BACKGROUNDS | COLOURS).keys()
