"""The world of keys is closed: a key is honoured, refused by name, or given as ignored; none is trained in silence."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.samples.fields import IMAGE_NAMES, plain_name
from qwen_vl_lora.samples.meanings import PREFERENCE_FLAGS, SCORE_FLAGS, UNSUPPORTED
from qwen_vl_lora.samples.record_forms import RecordReader
from qwen_vl_lora.samples.records import RowError, SourceSample
from qwen_vl_lora.samples.references import Place

READER = RecordReader(Place(Path("/pictures")))
QUESTION = {"role": "user", "content": "<image>What is this?"}
ANSWER = {"role": "assistant", "content": "A dog."}


def read(record: dict) -> SourceSample:
    (sample,) = READER.read(record, 1)
    return sample


def chat(*turns: dict, **keys: object) -> dict:
    return {"images": ["a.jpg"], "messages": list(turns or (QUESTION, ANSWER)), **keys}


# What each form may hold beside what it needs, and what becomes of it: the test's own account, not the code's.
UNKNOWN = st.text(string.ascii_lowercase + "_", min_size=3, max_size=12).map(lambda name: f"x_{name}")
MEANT = ("objects", "bbox", "videos", "audio", "rejected_response", "rejected_messages", "tools", "tool_calls",
         "function_call", "reasoning_content", "thinking", "chosen", "rejected", "refusal")  # fmt: skip
HOLDING = st.sampled_from(["text", ["text"], {"key": "text"}])
VALUES = HOLDING | st.sampled_from([0, 1, 0.5, True, False])
SPELLINGS = st.sampled_from([str, str.upper, str.title])


def keys_of(names: st.SearchStrategy[str], values: st.SearchStrategy[object]) -> st.SearchStrategy[dict]:
    return st.dictionaries(names, values, max_size=2)


PARTS = st.fixed_dictionaries(
    {
        level: st.tuples(keys_of(UNKNOWN, VALUES), keys_of(st.sampled_from(MEANT), HOLDING))
        for level in ("record", "turn", "content", "picture")
    }
)
FLAGS = st.dictionaries(st.sampled_from(SCORE_FLAGS), st.sampled_from([0, 1, False, True, 0.3, "false"]), max_size=1)


@settings(max_examples=300, deadline=None)
@given(parts=PARTS, flag=FLAGS, record_flag=FLAGS, is_pair=st.booleans(), spell=SPELLINGS)
def test_no_key_of_a_random_record_is_trained_in_silence(parts, flag, record_flag, is_pair, spell):
    unknown = {level: {spell(name): value for name, value in found.items()} for level, (found, _) in parts.items()}
    meant = {level: {spell(name): value for name, value in found.items()} for level, (_, found) in parts.items()}
    picture = {"type": "image_url", "image_url": {"url": "a.jpg", **unknown["picture"]}}
    question = {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}
    content = {"type": "text", "text": "A dog.", **unknown["content"], **meant["content"]}
    answer = {"role": "assistant", "content": [content], **unknown["turn"], **meant["turn"]}
    last = {"human": "Hi.", "assistant": "Hello."} if is_pair else answer
    last |= {spell(name): value for name, value in flag.items()}
    record = {"messages": [question, answer, last] if is_pair else [question, last]}
    record |= unknown["record"] | meant["record"] | {spell(name): value for name, value in record_flag.items()}
    wrong = [*meant["record"], *meant["turn"], *meant["content"]]
    wrong += [spell(name) for name, value in flag.items() if value in (0.3, "false")]
    wrong += [spell(name) for name, value in record_flag.items() if value != 1]
    if wrong:
        with pytest.raises(RowError) as fault:
            read(record)
        assert fault.value.reason == "unsupported_content"
        assert any(f"`{name}`" in fault.value.detail for name in wrong)
        return
    if not is_pair and 0 in flag.values():  # honoured: nothing is left to learn, which `clean_turns` rejects
        assert [turn.scored for turn in read(record).turns] == [True, False]
        return
    sample = read(record)
    for level, keys in unknown.items():
        assert {key if level == "record" else f"{key} (of a {level})" for key in keys} <= set(sample.ignored)
    assert sample.turns[-1].scored is (0 not in flag.values())


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_key_that_means_what_is_not_supported_rejects_the_row_by_its_name(name):
    for record in (chat(**{name: ["x"]}), chat(QUESTION, ANSWER | {name: ["x"]})):
        with pytest.raises(RowError, match=f"`{name}`") as fault:
            read(record)
        assert fault.value.reason == "unsupported_content"
    for nothing in (None, [], {}, "", float("nan")):
        assert read(chat(QUESTION, ANSWER | {name: nothing}, **{name: nothing})).turns[-1].text == "A dog."


@pytest.mark.parametrize("name", SCORE_FLAGS)
@pytest.mark.parametrize("off", [0, 0.0, False])
def test_a_turn_that_is_off_is_context_and_no_target(name, off):
    sample = read(chat(QUESTION, ANSWER | {name: off}, {"role": "user", "content": "And now?"}, ANSWER))
    assert [turn.scored for turn in sample.turns if turn.role == "assistant"] == [False, True]
    pairs = {"images": ["a.jpg"], "conversation": [{"human": "<image>Hi", "assistant": "Bad.", name: off}]}
    assert [turn.scored for turn in read(pairs).turns] == [True, False]
    with pytest.raises(RowError, match=f"`{name}` of the whole record"):
        read(chat(**{name: off}))
    with pytest.raises(RowError, match=f"`{name}` of the whole record"):
        read({"image": "a.jpg", "caption": "A dog.", name: off})


@pytest.mark.parametrize("name", PREFERENCE_FLAGS)
def test_an_answer_that_is_marked_as_bad_is_not_trained(name):
    for bad in (False, 0, "false", "0"):
        with pytest.raises(RowError, match=rf"`{name}` is .*\(KTO\)"):
            read(chat(**{name: bad}))
    assert name not in read(chat(**{name: True})).ignored
    assert name in read(chat(**{name: "dog"})).ignored


def test_a_class_under_label_beside_a_caption_is_no_verdict():
    assert read({"image": "a.jpg", "caption": "A dog.", "label": 0}).ignored == ("label",)
    with pytest.raises(RowError, match=r"\(KTO\)"):
        read({"image": "a.jpg", "caption": "A dog.", "label": False})


@pytest.mark.parametrize("name", ["is_rejected", "iscrowd", "rejected", "excluded", "Is Deleted", "was_cancelled"])
@pytest.mark.parametrize("on", [True, 1, 1.0, "true", "Yes"])
def test_a_row_that_the_data_set_marks_as_unusable_is_rejected(name, on):
    with pytest.raises(RowError, match=f"`{name}`") as fault:
        read({"image": "a.jpg", "caption": "A dog.", name: on})
    assert fault.value.reason == "rejected_by_source"
    for off in (False, 0, "0", "no", "", None):
        assert read({"image": "a.jpg", "caption": "A dog.", name: off}).turns[0].text == "A dog."


@pytest.mark.parametrize("name", ["is_valid", "usable", "keep", "approved"])
def test_a_row_that_the_data_set_does_not_mark_as_usable_is_rejected(name):
    with pytest.raises(RowError, match=f"`{name}` is False"):
        read(chat(**{name: False}))
    assert read(chat(**{name: True})).turns[-1].text == "A dog."
    with pytest.raises(RowError, match="expected true or false, got 'perhaps'"):
        read({"image": "a.jpg", "caption": "A dog.", name: "perhaps"})


@pytest.mark.parametrize("key", ["images", "image", "attachments"])
def test_a_picture_inside_a_turn_is_not_dropped(key):
    with pytest.raises(RowError, match=f"The turn has `{key}`"):
        read({"messages": [{"role": "user", "content": "What?", key: ["a.jpg"]}, ANSWER]})


@pytest.mark.parametrize("name", ["Image", "IMAGES", "Image Path", *IMAGE_NAMES])
def test_a_picture_beside_turns_is_found_under_any_usual_name_and_case(name):
    record = {name: "a.jpg", "messages": [{"role": "user", "content": "What?"}, ANSWER]}
    assert read(record).images == (Path("/pictures/a.jpg"),)


def test_two_keys_with_other_pictures_are_refused_and_an_address_beside_is_named():
    with pytest.raises(RowError, match="`images` and `image` name different pictures"):
        read(chat(image="b.jpg"))
    assert read(chat(image="a.jpg")).images == (Path("/pictures/a.jpg"),)
    assert read(chat(image=[], image_path=None)).images == (Path("/pictures/a.jpg"),)
    assert read(chat(url="https://example.org/a.jpg")).ignored == ("url",)


def test_a_picture_that_is_named_and_empty_does_not_make_a_question_without_one():
    with pytest.raises(RowError) as fault:
        read({"image": "", "messages": [{"role": "user", "content": "What?"}, ANSWER]})
    assert fault.value.reason == "missing_image"


def test_parts_of_an_instruction_are_joined_or_refused():
    record = {"images": ["a.jpg"], "instruction": "Say", "input": "what.", "output": "A dog."}
    assert read(record).turns[0].text == "<image>Say\nwhat."
    with pytest.raises(RowError, match="`input` must be a text"):
        read(record | {"input": ["what."]})
    with pytest.raises(RowError, match="cannot have `history`"):
        read({"images": ["a.jpg"], "prompt": [QUESTION], "completion": [ANSWER], "history": [["a", "b"]]})


@given(name=UNKNOWN)
@settings(max_examples=20, deadline=None)
def test_a_key_that_is_not_known_is_given_as_ignored_in_every_form(name):
    assume(plain_name(name) not in UNSUPPORTED)
    forms = [
        chat(),
        {"image": "a.jpg", "caption": "A dog."},
        {"image": "a.jpg", "question": "What?", "answer": "A dog."},
        {
            "data": {"image": "a.jpg"},
            "annotations": [{"result": [{"type": "textarea", "value": {"text": ["A dog."]}}]}],
        },
    ]
    for record in forms:
        (listed,) = read(record | {name: 1}).ignored
        assert listed.startswith(name)
