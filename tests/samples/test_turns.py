from __future__ import annotations

import pytest

from qwen_vl_lora.samples.records import RowError, Turn
from qwen_vl_lora.samples.turns import clean_turns

ASK, ANSWER = Turn("user", "<image> What is it?"), Turn("assistant", "A dog.")


def reason_of(turns, num_images: int = 1) -> str:
    with pytest.raises(RowError) as fault:
        clean_turns(turns, num_images, collapse_whitespace=True)
    return fault.value.reason


@pytest.mark.parametrize(
    ("turns", "num_images"),
    [
        pytest.param([ANSWER], 1, id="caption"),
        pytest.param([Turn("system", "Be brief."), ANSWER], 1, id="caption with system"),
        pytest.param([ASK, ANSWER], 1, id="one question"),
        pytest.param([Turn("system", "Be brief."), ASK, ANSWER, Turn("user", "Sure?"), ANSWER], 1, id="two questions"),
        pytest.param([Turn("user", "<image> or <image>?"), ANSWER], 2, id="two images"),
        pytest.param([Turn("user", "Hello"), ANSWER], 0, id="text only"),
    ],
)
def test_good_turns_are_kept_as_they_are(turns, num_images):
    assert clean_turns(turns, num_images, collapse_whitespace=True) == tuple(turns)


def test_a_question_that_is_only_its_image_makes_a_caption():
    assert clean_turns([Turn("user", " <image>\n"), ANSWER], 1, collapse_whitespace=True) == (ANSWER,)


def test_texts_are_cleaned_in_every_turn():
    turns = [Turn("system", " Be\nbrief. "), Turn("user", "<image>\nWhat\x00?"), Turn("assistant", " A  dog. ")]
    assert [turn.text for turn in clean_turns(turns, 1, collapse_whitespace=True)] == [
        "Be brief.",
        "<image> What?",
        "A dog.",
    ]


@pytest.mark.parametrize("text", ["", "   ", "\n\t ", "\x00\x01\x7f", "\ufeff", "nan", "NaN"])
def test_a_caption_without_content_is_rejected(text):
    assert reason_of([Turn("assistant", text)]) == "empty_caption"


@pytest.mark.parametrize("turn", [Turn("user", "  "), Turn("system", "")])
def test_an_empty_prompt_is_rejected(turn):
    turns = [turn, ANSWER] if turn.role == "user" else [turn, ASK, ANSWER]
    assert reason_of(turns) == "empty_prompt"


@pytest.mark.parametrize(
    ("reason", "roles"),
    [
        ("wrong_roles", ["user", "teacher"]),
        ("wrong_roles", ["assistant", "user"]),
        ("wrong_roles", ["user", "assistant", "system", "assistant"]),
        ("odd_turns", ["user", "assistant", "user"]),
        ("odd_turns", ["assistant", "user", "assistant"]),
        ("no_answer", []),
        ("no_answer", ["user"]),
        ("no_answer", ["system", "user"]),
    ],
)
def test_turns_out_of_order_are_rejected(reason, roles):
    assert reason_of([Turn(role, "text") for role in roles]) == reason


@pytest.mark.parametrize(
    ("turns", "num_images"),
    [
        ([ASK, ANSWER], 0),
        ([ASK, ANSWER], 2),
        ([Turn("user", "What is it?"), ANSWER], 1),
        ([ANSWER], 0),
        ([ANSWER], 2),
    ],
)
def test_another_number_of_slots_than_of_images_is_rejected(turns, num_images):
    assert reason_of(turns, num_images) == "placeholder_mismatch"


def clean(*turns: Turn, num_images: int = 1, **settings) -> list[Turn]:
    return list(clean_turns(turns, num_images, **({"collapse_whitespace": True} | settings)))


def test_the_mark_of_pretraining_data_is_the_place_of_the_picture():
    assert clean(Turn("assistant", "<image>A dog.")) == [ANSWER]


def test_consecutive_turns_of_one_role_are_joined_in_their_order():
    turns = clean(Turn("user", "What is this?"), Turn("user", "<image>"), ANSWER, collapse_whitespace=False)
    assert turns == [Turn("user", "What is this?\n<image>"), ANSWER]


def test_answers_that_differ_in_being_learned_are_not_joined():
    assert reason_of([ASK, Turn("assistant", "Bad.", scored=False), ANSWER]) == "wrong_roles"


def test_turns_behind_the_last_answer_that_is_learned_are_dropped():
    bad = Turn("assistant", "BAD", scored=False)
    assert clean(ASK, bad, Turn("user", "Again."), ANSWER) == [ASK, bad, Turn("user", "Again."), ANSWER]
    assert clean(ASK, ANSWER, Turn("user", "Again."), bad) == [ASK, ANSWER]
    assert reason_of([ASK, bad]) == "nothing_scored"


MARKS = [
    "<image1>",
    "<image_1>",
    "<image 1>",
    "<video>",
    "<audio>",
    "<bbox>",
    "<ref-object>",
    "<Image>",
    "<img>",
    "</img>",
]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_mark_that_names_no_picture_rejects_the_row(role, mark):
    turns = {"system": Turn("system", "Be brief."), "user": ASK, "assistant": ANSWER}
    turns[role] = Turn(role, f"{turns[role].text} {mark}")
    assert reason_of(list(turns.values())) == "unsupported_content"


@pytest.mark.parametrize(
    "text", ["A <b>bold</b> dog", "x <y> z", "<div>", "a < image > b", "<imagery>", "<svg><image href='a'/>"]
)
def test_other_angle_brackets_are_text(text):
    assert clean(Turn("assistant", text))[0].text == text


@pytest.mark.parametrize("text", ["None", "null", "N/A", "NaT", "#REF!", "[]", "undefined", "<NA>", " nan "])
def test_a_word_that_stands_for_a_missing_caption_is_rejected_unless_it_is_meant(text):
    assert reason_of([Turn("assistant", text)]) == "empty_caption"
    assert clean(Turn("assistant", text), keep_nothing_words=True)[0].text == text.strip()
