"""Answers are true of their pictures, long where a description is asked for, and varied."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from qwen_vl_lora.tiny import dialogue
from qwen_vl_lora.tiny.dialogue import DESCRIBE_PROMPT, Topic, long_description, random_conversation
from qwen_vl_lora.tiny.drawing import Placed, Scene, Thing, random_scene
from qwen_vl_lora.tiny.language import name, place, read_attributes, true_attributes

SCENE = Scene(
    "grey",
    (
        Placed(Thing("big", "red", "circle"), row=0, column=0, shift=(0, 0)),
        Placed(Thing("small", "blue", "square"), row=1, column=1, shift=(0, 0)),
    ),
)


def random_scenes(count: int) -> list[Scene]:
    rng = random.Random(13)
    return [random_scene(rng) for _ in range(count)]


def answers_by_question(topic: Topic) -> dict[str, str]:
    rng = random.Random(17)
    return dict(topic(SCENE, rng) for _ in range(300))


def test_first_form_of_the_long_description() -> None:
    assert long_description(SCENE, form=0) == (
        "This picture shows two objects on a grey background. At the top left there is a big red circle. "
        "In the middle there is a small blue square."
    )


@pytest.mark.parametrize("form", range(3))
def test_long_descriptions_read_back_as_their_scene(form: int) -> None:
    for scene in random_scenes(300):
        assert read_attributes(long_description(scene, form)) == true_attributes(scene)


@pytest.mark.parametrize("form", range(3))
def test_long_descriptions_name_each_place_in_the_sentence_of_its_thing(form: int) -> None:
    for scene in random_scenes(100):
        sentences = long_description(scene, form).lower().split(". ")
        for placed in scene.objects:
            (sentence,) = [sentence for sentence in sentences if name(placed.thing) in sentence]
            # "at the top" also begins "at the top left".
            assert re.search(rf"{place(placed)}(?! left| right)", sentence)


@pytest.mark.parametrize("form", range(3))
def test_long_descriptions_have_about_25_to_60_words(form: int) -> None:
    lengths = [len(long_description(scene, form).split()) for scene in random_scenes(300)]
    assert min(lengths) >= 24
    assert max(lengths) <= 60


def test_list_names_everything() -> None:
    for scene in random_scenes(100):
        _, answer = dialogue.list_things(scene, random.Random(0))
        assert read_attributes(answer) == true_attributes(scene)


def test_questions_about_places_are_answered_from_the_right_cell() -> None:
    answers = answers_by_question(dialogue.tell_what)
    assert answers["What is at the top left?"] == "At the top left there is a big red circle."
    assert answers["What is at the top left? Answer briefly."] == "big red circle"
    assert answers["What is at the bottom?"] == "There is nothing at the bottom."


def test_questions_about_things_are_answered_with_their_place() -> None:
    assert answers_by_question(dialogue.tell_where) == {
        "Where is the red circle?": "The red circle is at the top left.",
        "Where is the red circle? Answer briefly.": "at the top left",
        "Where is the blue square?": "The blue square is in the middle.",
        "Where is the blue square? Answer briefly.": "in the middle",
    }


def test_questions_about_attributes_are_answered_right() -> None:
    answers = answers_by_question(dialogue.tell_attribute)
    assert answers["Which colour is the object at the top left?"] == "The object at the top left is red."
    assert answers["Which shape is the object in the middle?"] == "The object in the middle is a square."
    assert answers["How big is the object in the middle? Answer briefly."] == "small"


def test_relations_are_told_both_ways() -> None:
    answers = answers_by_question(dialogue.tell_relation)
    assert answers["How does the red circle lie to the blue square?"] == (
        "The big red circle is above the small blue square."
    )
    assert answers["How does the blue square lie to the red circle? Answer briefly."] == (
        "small blue square below big red circle"
    )


def test_counts_and_backgrounds_are_told() -> None:
    assert set(answers_by_question(dialogue.count_things).values()) == {
        "I see two objects in this picture.",
        "two objects",
    }
    assert set(answers_by_question(dialogue.tell_background).values()) == {"The background is grey.", "grey"}


def test_presence_is_affirmed_for_things_that_are_there_only() -> None:
    present = {name(thing) for thing in SCENE.things}
    for question, answer in answers_by_question(dialogue.tell_presence).items():
        asked = question.removeprefix("Is there a ").removesuffix("?")
        assert answer.startswith("Yes") == (asked in present)


def test_default_prompt_is_the_commonest_and_only_asks_for_long_descriptions() -> None:
    rng = random.Random(19)
    turns = [turn for _ in range(3_000) for turn in random_conversation(rng)]
    prompts = Counter(turn.question for turn in turns)
    assert prompts.most_common(1)[0][0] == DESCRIBE_PROMPT
    # So that fine-tuning has something to teach: the base never answers it tersely.
    assert all(len(turn.answer.split()) >= 24 for turn in turns if turn.question == DESCRIBE_PROMPT)


def test_pictures_come_with_the_first_turn_only() -> None:
    rng = random.Random(23)
    conversations = [random_conversation(rng) for _ in range(2_000)]
    assert not any(turn.pictures for talk in conversations for turn in talk[1:])
    assert {len(talk[0].pictures) for talk in conversations} == {0, 1, 2}
    assert {len(talk) for talk in conversations} == {1, 2, 3}


def test_same_seed_draws_the_same_conversations() -> None:
    first, second = ([random_conversation(random.Random(3)) for _ in range(20)] for _ in range(2))
    assert first == second
