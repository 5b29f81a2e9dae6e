"""What was trained is read from conversations, recorded with its counts, and asked again in the same form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError, ParameterError
from qwen_vl_lora.samples.conversations import ask_about, ask_alike, image_marker, parse_conversation
from qwen_vl_lora.samples.prompts import MAX_LISTED, TrainedPrompt, question_of
from samples.pictures import prompt_parameters

PATH = "data/files/aa.jpg"
MARKER = image_marker(PATH)


def talk(*turns: tuple[str, str]):
    return parse_conversation(
        {"id": "talk", "conversations": [{"from": role, "value": value} for role, value in turns]}
    )


def asking(question: str, *, system: str | None = None):
    head = [] if system is None else [("system", system)]
    return talk(*head, ("user", question), ("assistant", "A dog."))


def trained_on(*conversations) -> TrainedPrompt:
    """As it is after the way through `adapter_record.json`."""
    written = TrainedPrompt.of_conversations(conversations, override=False).to_record()
    return TrainedPrompt.of_record(json.loads(json.dumps(written)))


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=20)


@given(before=TEXTS, after=TEXTS, system=st.none() | TEXTS.filter(str.strip))
def test_the_trained_question_is_asked_again_part_for_part(before, after, system):
    conversation = asking(f"{before}{MARKER}{after}", system=system)
    prompt = trained_on(conversation).choose()
    assert ask_about(PATH, prompt).turns == conversation.turns[:-1]


@pytest.mark.parametrize(
    ("value", "question"),
    [
        (f"COCO Yes: {MARKER}", "COCO Yes:"),
        (f"{MARKER}\nWhat?", "What?"),
        (f"Look at {MARKER} and describe it.", "Look at <image> and describe it."),
        (MARKER, "<image>"),
        (f"{MARKER}{MARKER} Which differs?", "<image><image>Which differs?"),
        ("What is 1 + 1?", None),
    ],
)
def test_a_question_is_the_first_user_turn_with_the_pictures_place_where_it_is_not_first(value, question):
    conversation = talk(("user", value), ("assistant", "x"), ("user", "Sure?"), ("assistant", "y"))
    assert question_of(conversation) == question


def test_one_question_is_recorded_as_the_parameters_would_state_it():
    conversations = [asking(f"COCO Yes: {MARKER}", system="Be brief.")] * 3
    trained = TrainedPrompt.of_conversations(conversations, override=True)
    assert trained.to_record() == {"user": "COCO Yes:", "system": "Be brief.", "override": True}
    assert trained.sentence() == "All pictures are asked: 'COCO Yes:' (3 samples); system text: 'Be brief.'."


def test_several_questions_are_recorded_with_their_counts_most_frequent_first():
    conversations = [asking(f"{MARKER}{number}?") for number in range(30) for _ in range(number + 1)]
    trained = TrainedPrompt.of_conversations(conversations, override=False)
    record = trained.to_record()
    assert (record["user"], record["system"]) == (None, None)
    assert [entry["text"] for entry in record["questions"]] == [f"{number}?" for number in range(29, 9, -1)]
    assert record["questions"][0] == {"text": "29?", "samples": 30}
    assert (len(record["questions"]), record["other_questions"]) == (MAX_LISTED, 10)
    assert "systems" not in record
    assert "30 different questions: '29?' (30 samples), '28?' (29 samples), '27?' (28 samples), 27 more" in (
        trained.sentence()
    )


def test_where_several_were_trained_none_is_guessed_and_the_options_are_named():
    trained = trained_on(asking(f"A? {MARKER}"), asking(f"A? {MARKER}"), asking(f"B? {MARKER}", system="Be brief."))
    assert trained.choose() is None
    assert trained.choose(user="A?") is None
    assert trained.choose(system="") is None
    for text in (
        "'A?' (2 samples), 'B?' (1 samples)",
        "'Be brief.' (1 samples)",
        "--prompt",
        "--system",
        "prompt.user",
    ):
        assert text in trained.refusal()
    chosen = trained.choose(user="B?", system="Be brief.")
    assert (chosen.user, chosen.system) == ("B?", "Be brief.")
    assert trained.choose(user="B?", system="").system is None


def test_of_text_without_pictures_no_question_about_a_picture_is_recorded():
    trained = trained_on(asking("What is 1 + 1?"))
    assert trained.choose() is None
    assert "trained without a picture in a first question" in trained.refusal()
    mixed = trained_on(asking("What is 1 + 1?"), asking(f"COCO Yes: {MARKER}"))
    assert mixed.choose().user == "COCO Yes:"


def test_a_record_of_an_older_version_is_taken_by_what_it_says():
    trained = TrainedPrompt.of_record({"user": "Describe this picture.", "system": None, "override": False})
    assert trained.choose() == prompt_parameters(user="Describe this picture.")


@pytest.mark.parametrize("written", ["COCO Yes:", " COCO Yes: ", "COCO Yes:<image>"])
def test_a_configured_prompt_is_compared_by_what_it_asks(written):
    trained = trained_on(asking(f"COCO Yes: {MARKER}"))
    assert trained.differences(prompt_parameters(user=written)) == []
    (difference,) = trained.differences(prompt_parameters(user="Describe."))
    assert difference == "prompt: trained with 'COCO Yes:', configured 'Describe.'"
    (difference,) = trained.differences(prompt_parameters(user=written, system="Be brief."))
    assert "trained with system text the chat template's own, configured 'Be brief.'" in difference


def test_a_given_text_that_cannot_be_asked_is_refused():
    with pytest.raises(ParameterError, match="The prompt '' is not valid"):
        trained_on(asking(f"COCO Yes: {MARKER}")).choose(user="")
    with pytest.raises(DataFormatError, match="has 2 <image> for 1 pictures"):
        ask_about(PATH, prompt_parameters(user="<image><image> Which differs?"))


@pytest.mark.parametrize(
    ("turns", "alike"),
    [
        ([("assistant", "A dog.")], False),
        ([("user", "<image> What?"), ("assistant", "A dog.")], True),
    ],
)
def test_two_prompts_are_alike_where_samples_bring_their_own_texts(turns, alike):
    sample = {"row": 1, "images": ["aa"], "turns": [{"role": role, "text": text} for role, text in turns]}
    assert ask_alike([sample], prompt_parameters(), prompt_parameters(user="Describe.")) is alike
    assert ask_alike([sample], prompt_parameters(), prompt_parameters())
    override = prompt_parameters(override=True)
    assert ask_alike([sample], prompt_parameters(), override) is not alike
