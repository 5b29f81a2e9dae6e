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
        ("wrong_roles", ["user", "user", "assistant", "assistant"]),
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


def test_a_slot_in_an_answer_is_only_text():
    turns = [Turn("assistant", "The tag <image> in HTML.")]
    assert clean_turns(turns, 1, collapse_whitespace=True) == tuple(turns)
