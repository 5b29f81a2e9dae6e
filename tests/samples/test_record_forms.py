from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.blocks import shown_under
from qwen_vl_lora.parameters import ColumnsParameters
from qwen_vl_lora.samples import record_forms
from qwen_vl_lora.samples.record_forms import RecordReader
from qwen_vl_lora.samples.records import RowError, Turn
from qwen_vl_lora.samples.references import Place
from qwen_vl_lora.samples.source import Reading
from qwen_vl_lora.samples.sources import CaptionsFile

FOLDER = Path("/data/mine")
A, B = FOLDER / "a.jpg", FOLDER / "b.jpg"
ANSWER = Turn("assistant", "A dog.")


def read_record(record, row: int, folder: Path) -> tuple:
    """Id, images and turns of a record that is one sample."""
    (sample,) = RecordReader(Place(folder)).read(record, row)
    return sample.id, sample.images, sample.turns


def gpt(**keys) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    return {"conversations": turns} | keys


def messages(content, **keys) -> dict:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]} | keys


@pytest.mark.parametrize(
    ("record", "image_id", "images", "text"),
    [
        pytest.param(
            {
                "id": "identity_1",
                "conversations": [
                    {"from": "user", "value": "COCO Yes: <|vision_start|>/data/mine/a.jpg<|vision_end|>"},
                    {"from": "assistant", "value": "A dog."},
                ],
            },
            "identity_1",
            (A,),
            "COCO Yes: <image>",
            id="tutorial",
        ),
        pytest.param(gpt(id="000000033471", image="a.jpg"), "000000033471", (A,), "<image>\nWhat?", id="LLaVA"),
        pytest.param(gpt(id=33471, image=["a.jpg"]), "33471", (A,), "<image>\nWhat?", id="number as id"),
        pytest.param(messages("<image>What?", images=["a.jpg"]), "a.jpg", (A,), "<image>What?", id="ms-swift"),
        pytest.param(
            messages("<image><image>?", images=["a.jpg", {"path": "b.jpg"}]),
            "row_7",
            (A, B),
            "<image><image>?",
            id="two",
        ),
        pytest.param(
            messages([{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "What?"}]),
            "a.jpg",
            (A,),
            "<image>What?",
            id="OpenAI",
        ),
        pytest.param(
            messages([{"type": "text", "text": "What?"}, {"type": "image", "image": "file:///data/mine/a.jpg"}]),
            "a.jpg",
            (A,),
            "What?<image>",
            id="Qwen",
        ),
        pytest.param(
            messages([{"type": "image"}, {"type": "text", "text": "What?"}], images=["a.jpg"]),
            "a.jpg",
            (A,),
            "<image>What?",
            id="Hugging Face",
        ),
        pytest.param(
            messages("<|vision_start|><|image_pad|><|vision_end|>What?", images=["a.jpg"]),
            "a.jpg",
            (A,),
            "<image>What?",
            id="Qwen's own placeholder",
        ),
        pytest.param(messages("What?", images=["a.jpg"]), "a.jpg", (A,), "<image>What?", id="no slot"),
        pytest.param(
            messages("What?", images=["a.jpg", "b.jpg"]), "row_7", (A, B), "<image><image>What?", id="no slots"
        ),
        pytest.param(
            {"query": "<image>What?", "response": "A dog.", "images": ["a.jpg"], "history": []},
            "a.jpg",
            (A,),
            "<image>What?",
            id="ms-swift query",
        ),
        pytest.param(
            {"conversation": [{"human": "<image>What?", "assistant": "A dog."}], "images": ["a.jpg"]},
            "a.jpg",
            (A,),
            "<image>What?",
            id="ms-swift ShareGPT",
        ),
        pytest.param(messages("<img>/data/mine/a.jpg</img>What?"), "a.jpg", (A,), "<image>What?", id="Qwen-VL"),
        pytest.param(
            {"conversations": [{"role": "user", "value": "a.jpg"}, {"role": "assistant", "value": "A dog."}]},
            "a.jpg",
            (A,),
            "<image>",
            id="bare path",
        ),
        pytest.param(messages("Hello"), "row_7", (), "Hello", id="text only"),
        pytest.param(messages("Who took a.jpg"), "row_7", (), "Who took a.jpg", id="a question about a file"),
    ],
)
def test_each_form_gives_images_and_turns(record, image_id, images, text):
    assert read_record(record, 7, FOLDER) == (image_id, images, (Turn("user", text), ANSWER))


def test_images_that_some_slots_lack_are_given_for_the_count_of_slots_to_notice():
    _, images, turns = read_record(messages("<image>What?", images=["a.jpg", "b.jpg"]), 1, FOLDER)
    assert images == (A, B)
    assert turns[0].text == "<image>What?"


@pytest.mark.parametrize(
    "record",
    [
        gpt(image="a.jpg"),
        messages("<image>\nWhat?", images=["a.jpg"]),
        {"query": "<image>\nWhat?", "response": "A dog.", "images": ["a.jpg"]},
    ],
)
def test_a_system_text_beside_the_turns_is_their_first(record):
    _, _, turns = read_record(record | {"system": "Be brief."}, 1, FOLDER)
    assert turns == (Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), ANSWER)
    assert read_record(record | {"system": ""}, 1, FOLDER)[2] == turns[1:]


def test_earlier_rounds_of_a_query_come_before_it():
    record = {"query": "And now?", "response": "A cat.", "images": ["a.jpg"], "history": [["<image>What?", "A dog."]]}
    _, images, turns = read_record(record, 1, FOLDER)
    assert images == (A,)
    assert [turn.text for turn in turns] == ["<image>What?", "A dog.", "And now?", "A cat."]


@pytest.mark.parametrize("key", ["image_path", "image"])
def test_the_columns_of_a_csv_may_come_as_json(key):
    assert read_record({key: "a.jpg", "caption": "A dog."}, 7, FOLDER) == ("a.jpg", (A,), (ANSWER,))
    assert read_record({key: "a.jpg", "caption": "A dog.", "image_id": 391895}, 7, FOLDER)[0] == "391895"


def test_a_named_caption_is_one_even_beside_a_question():
    record = {"image": "a.jpg", "question": "Describe it.", "answer": ["A dog.", "One dog."]}
    reading = Reading(ColumnsParameters(caption="answer"))
    samples = RecordReader(Place(FOLDER), reading).read(record, 1)
    assert [sample.turns for sample in samples] == [(ANSWER,), (Turn("assistant", "One dog."),)]


def test_a_caption_may_come_without_a_question():
    record = {"messages": [{"role": "assistant", "content": "A dog."}], "images": ["a.jpg"]}
    assert read_record(record, 1, FOLDER) == ("a.jpg", (A,), (ANSWER,))


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("malformed_row", "text"),
        ("malformed_row", None),
        ("malformed_row", {"messages": "text"}),
        ("malformed_row", {"messages": []}),
        ("missing_key", {}),
        ("missing_key", {"image": "a.jpg", "note": "A dog."}),
        ("missing_key", {"caption": "A dog."}),
        ("empty_caption", {"image": "a.jpg", "caption": None}),
        ("malformed_row", {"image": "a.jpg", "caption": 7}),
        ("empty_caption", {"query": "What?", "response": None}),
        ("malformed_row", {"query": "What?", "response": "A dog.", "history": [["What?"]]}),
        ("malformed_row", {"query": "What?", "response": "A dog.", "history": "none"}),
        ("missing_key", {"messages": [{"role": "user"}]}),
        ("missing_key", {"messages": ["text"]}),
        ("wrong_roles", {"messages": [{"role": "narrator", "content": "x"}]}),
        ("unsupported_content", {"messages": [{"role": "tool", "content": "x"}]}),
        ("wrong_roles", {"messages": [{"role": ["user"], "content": "x"}]}),
        ("empty_caption", {"messages": [{"role": "assistant", "content": None}]}),
        ("empty_caption", {"messages": [{"role": "assistant", "content": float("nan")}]}),
        ("malformed_row", {"messages": [{"role": "assistant", "content": 7}]}),
        ("unsupported_content", messages([{"type": "video", "video": "a.mp4"}])),
        ("unsupported_content", {**messages("<video>What?"), "videos": ["a.mp4"]}),
        ("unsupported_content", {**messages("<audio>What?"), "audio": "a.wav"}),
        ("malformed_row", messages([{"type": "text"}])),
        ("malformed_row", messages(["text"])),
        ("malformed_row", {"messages": [{"role": "assistant", "content": [{"type": "image", "image": "a.jpg"}]}]}),
        ("malformed_row", messages("<image>", images=[7])),
        ("missing_image", messages("<image>", images={"url": None})),
        ("bad_id", gpt(id=1.5, image="a.jpg")),
        ("bad_id", gpt(id=True, image="a.jpg")),
        ("url_not_allowed", gpt(image="https://example.org/a.jpg")),
        ("url_not_allowed", messages([{"type": "image_url", "image_url": {"url": "http://example.org/a.jpg"}}])),
        ("missing_image", gpt(image="")),
    ],
)
def test_records_in_no_form_are_rejected_with_their_reason(reason, record):
    with pytest.raises(RowError) as fault:
        read_record(record, 1, FOLDER)
    assert fault.value.reason == reason


def test_a_form_made_as_contributing_says_is_read_through_the_usual_door(tmp_path, monkeypatch):
    function, rewrites = shown_under("Add a form of captions")
    names = dict(vars(record_forms))
    exec(function + rewrites, names)
    (tmp_path / "a.jpg").touch()
    record = {"pic": "a.jpg", "dialog": ["What is it?", "A dog.", "Where?", "On grass."], "mood": "calm"}
    file = tmp_path / "dialogs.jsonl"
    file.write_text(f"{json.dumps(record)}\n{json.dumps({**record, 'bbox': [1, 2, 3, 4]})}\n", encoding="utf-8")
    assert [row.reason for row in CaptionsFile(file)] == ["missing_key", "missing_key"]
    monkeypatch.setattr(record_forms, "REWRITES", names["REWRITES"])
    sample, rejected = CaptionsFile(file)
    assert sample.images == (tmp_path / "a.jpg",)
    assert [(turn.role, turn.text) for turn in sample.turns] == [
        ("user", "<image>What is it?"),
        ("assistant", "A dog."),
        ("user", "Where?"),
        ("assistant", "On grass."),
    ]
    assert sample.ignored == ("mood",)
    assert rejected.reason == "unsupported_content"
