"""Kinds of captions that were once trained as something else, or refused without reason: from file to samples."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_lora.samples.collection import Collected, collect
from qwen_vl_lora.samples.sources import CaptionsFile
from qwen_vl_lora.samples.tally import sentence, told
from qwen_vl_lora.samples.texts import NOTHING_WORDS, clean_text
from samples.pictures import (
    captions_parameters,
    encode,
    image_parameters,
    jpeg,
    picture,
    png,
    quarantine_parameters,
    workspace_folder,
    write,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "mine"
    for seed in range(6):
        write(folder / f"{seed}.jpg", jpeg(seed))
    return folder


def collected(file: Path, **captions) -> Collected:
    return collect(
        CaptionsFile(file),
        workspace_folder(file.parents[1]),
        captions_parameters(**captions),
        image_parameters(),
        quarantine_parameters(1.0),
    )


def of_records(folder: Path, *records: object, **captions) -> Collected:
    return collected(write(folder / "c.json", json.dumps(records).encode()), **captions)


def of_table(folder: Path, rows: list[list[object]], header: str = "image_path,caption", **captions) -> Collected:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return collected(write(folder / "c.csv", text.getvalue().encode()), **captions)


def answers(found: Collected) -> list[str]:
    return [sample["turns"][-1]["text"] for sample in found.samples]


def reasons(found: Collected) -> list[str]:
    return found.rejected_samples["reason"].tolist()


def chat(question: str, answer: str, image: str = "0.jpg", **keys: object) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": [image], "messages": turns, **keys}


# --- marks -------------------------------------------------------------------------------------

MARKS = ["<image1>", "<image_1>", "<IMAGE>", "<video>", "<audio>", "</image>", "<img>", "<image_placeholder>", "<bbox>",
         "<ref-object>", "<ImageHere>"]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_that_names_no_picture_rejects_the_row_in_any_turn(folder, mark):
    found = of_records(
        folder,
        chat(f"<image>{mark} What?", "A dog."),
        chat("<image>What?", f"A {mark} dog."),
        chat("<image>What?", "A dog.", system=f"Look at {mark}."),
        {"image_path": "1.jpg", "caption": f"{mark} A dog. {mark}"},
        chat("<image>What?", "A dog."),
    )
    assert reasons(found) == ["unsupported_content"] * 4
    assert len(found.samples) == 1


def test_the_mark_of_an_answer_without_a_question_is_the_pictures_place(folder):
    pre_training = [{"from": "gpt", "value": "<image>\nA dog."}]
    found = of_records(folder, {"image": "0.jpg", "conversations": pre_training})
    assert found.samples[0]["turns"] == [{"role": "assistant", "text": "A dog."}]
    assert len(found.samples[0]["images"]) == 1


# --- white space -------------------------------------------------------------------------------

CODE = "```python\nif a:\n    print(1)\n```\n\n- one\n- two"


def test_line_breaks_of_chats_are_kept_and_those_of_captions_collapsed(folder):
    records = [chat("<image>As JSON:\n{}", CODE), {"image_path": "1.jpg", "caption": " A\n dog. "}]
    found = of_records(folder, *records)
    assert answers(found) == [CODE, "A dog."]
    assert found.samples[0]["turns"][0]["text"] == "<image>As JSON:\n{}"
    assert found.summary["forms"] == {
        "messages": {"samples": 1, "collapse_whitespace": False, "texts_changed": 0},
        "caption": {"samples": 1, "collapse_whitespace": True, "texts_changed": 1},
    }
    assert answers(of_records(folder, *records, collapse_whitespace=True)) == [" ".join(CODE.split()), "A dog."]
    kept = of_records(folder, *records, collapse_whitespace=False)
    assert answers(kept) == [CODE, " A\n dog. "]
    assert [form["collapse_whitespace"] for form in kept.summary["forms"].values()] == [False, False]


@pytest.mark.parametrize("control", ["\v", "\f", "\x85", "\u2028", "\u2029", "\x1c", "\x1e"])
def test_characters_that_end_a_line_do_not_glue_words(folder, control):
    found = of_records(folder, chat("<image>?", f"One{control}two"), {"image": "1.jpg", "caption": f"One{control}two"})
    assert answers(found) == ["One\ntwo", "One two"]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_words_stay_apart_whatever_stands_between_them(text):
    separated = clean_text(f"a{' ' if not text.isspace() else ''}{text} b".replace("<|", ""), True)
    assert separated.startswith("a")
    assert separated.split()[0] == "a" or not text


# --- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        '["A dog.", "It runs."]',
        "['A dog.', 'It runs.']",
        "['A dog.' 'It runs.']",
        "['A dog.'\n 'It runs.']",
        "('A dog.', 'It runs.')",
        "[\"A dog.\", 'It runs.']",
    ],
)
def test_a_list_in_a_cell_is_several_captions(folder, cell):
    assert answers(of_table(folder, [["0.jpg", cell]])) == ["A dog.", "It runs."]
    assert answers(of_records(folder, {"image": "0.jpg", "caption": cell})) == ["A dog.", "It runs."]
    assert answers(of_records(folder, {"image": "0.jpg", "captions": ["A dog.", "It runs."]})) == ["A dog.", "It runs."]


@pytest.mark.parametrize("text", ["[A dog] runs.", "(A dog.)", "[sic]", "A ['list'] in it", "(1) A dog. (2) A cat."])
def test_brackets_in_a_caption_are_text(folder, text):
    assert answers(of_table(folder, [["0.jpg", text]])) == [text]


@pytest.mark.parametrize("word", sorted(NOTHING_WORDS))
def test_a_word_for_nothing_is_no_caption_in_any_form_unless_it_is_meant(folder, word):
    spellings = {word, word.upper(), word.title(), f" {word}\n"}
    for spelled in spellings:
        records = [{"image": "0.jpg", "caption": spelled}, chat("<image>?", spelled), chat("<image>?", "A dog.")]
        assert reasons(of_records(folder, *records)) == ["empty_caption"] * 2
        assert reasons(of_table(folder, [["0.jpg", spelled], ["1.jpg", "A dog."]])) == ["empty_caption"]
    if word.strip("[](){}'\" "):
        assert answers(of_records(folder, chat("<image>?", word), nothing_words="keep")) == [word]


def test_a_caption_that_only_begins_like_nothing_is_kept(folder):
    texts = ["None of them runs.", "Nan bread.", "Null island.", "N/A is written on a sign."]
    assert answers(of_table(folder, [["0.jpg", text] for text in texts])) == texts


# --- pictures that show nothing ----------------------------------------------------------------


def test_pictures_of_one_colour_are_reported_with_their_rows_and_kept(folder):
    write(folder / "white.png", encode(Image.new("RGB", (40, 30), "white"), "PNG"))
    found = of_table(folder, [["0.jpg", "A dog."], ["white.png", "A cat."], ["white.png", "A cow."]])
    (reported,) = found.summary["suspicious"]
    assert reported.pop("pictures") == found.samples[1]["images"]
    assert reported == {"kind": "picture_of_one_colour", "samples": 2, "rows": [2, 3]}
    assert len(found.samples) == 3


def test_one_picture_under_many_ids_with_other_captions_is_reported(folder):
    for number in range(4):
        write(folder / f"gone{number}.png", png(9))
        write(folder / f"same{number}.png", png(8))
    rows = [[f"gone{number}.png", f"Of {number}."] for number in range(4)]
    rows += [[f"same{number}.png", "One and the same."] for number in range(4)]
    rows += [["0.jpg", f"Caption {number}."] for number in range(4)]
    (reported,) = of_table(folder, rows).summary["suspicious"]
    assert reported.pop("sha256")
    assert reported == {"kind": "one_picture_under_many_ids", "samples": 4, "captions": 4, "rows": [1, 2, 3, 4]}


# --- flags and keys ----------------------------------------------------------------------------


def test_rows_that_the_data_set_marks_as_unusable_are_rejected_with_that_reason(folder):
    images = [{"id": number, "file_name": f"{number}.jpg", "is_deleted": number == 3} for number in range(4)]
    annotations = [
        {"id": number, "image_id": number, "caption": f"Of {number}.", "is_rejected": number == 1, "text_detected": 0}
        for number in range(4)
    ]
    vizwiz = {"images": images, "annotations": annotations}
    found = collected(write(folder / "vizwiz.json", json.dumps(vizwiz).encode()))
    assert answers(found) == ["Of 0.", "Of 2."]
    assert reasons(found) == ["rejected_by_source"] * 2
    assert found.summary["ignored_keys"] == {"text_detected": 2}
    table = of_table(folder, [["0.jpg", "A dog.", "True"], ["1.jpg", "A cat.", ""]], "image_path,caption,is_rejected")
    assert (answers(table), reasons(table)) == (["A cat."], ["rejected_by_source"])


def test_keys_that_are_not_read_are_counted_and_named_once(folder):
    records = [chat("<image>?", "A dog.", mood="good", source="web") for _ in range(3)]
    found = of_records(folder, *records, chat("<image>?", "A cat.", mood="bad"))
    assert found.summary["ignored_keys"] == {"mood": 4, "source": 3}
    (line,) = told(found.summary, "rejected.csv")
    assert line == "not read: mood (4 rows), source (3 rows)"


def test_the_terminal_names_what_was_rejected_and_changed_once_and_short(folder):
    write(folder / "a.heic", b"\0\0\0\x18ftypheic" + bytes(64))
    rows = [["0.jpg", "A  dog."], *[["a.heic", "A cat."]] * 11, *[["gone.jpg", "A cow."]] * 3]
    found = of_table(folder, rows)
    assert told(found.summary, "data/rejected_samples.csv") == [
        "rejected 14 of 15 rows: unsupported_format 11, missing_image 3; see data/rejected_samples.csv",
        "cleaning changed 1 text (white space, control characters)",
    ]
    assert sentence(found.summary) == (
        "1 sample of 15 rows; 14 rejected (unsupported_format 11, missing_image 3); 1 text changed by cleaning"
    )
    assert told(of_table(folder, [["0.jpg", "A dog."]]).summary, "x") == []


# --- names are not ids -------------------------------------------------------------------------

NAMES = ["Screenshot 9.41.00\u202fAM.jpg", "a\u00a0b.jpg", "写真\u30001.jpg", "کتاب\u200cها.jpg", "👩\u200d👧.jpg",
         "Dog.jpg", "dog.jpg", "DOG.JPG", "gross.jpg", "groß.jpg", "a/b.jpg", "a__b.jpg", "a\\b.jpg", "Café.jpg",
         "Cafe\u0301.jpg", "x\u200by.jpg", "a b.jpg", "a  b.jpg"]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_name_of_a_file_never_refuses_or_merges_pictures_whatever_the_order(folder, seed):
    names = random.Random(seed).sample(NAMES, len(NAMES))
    for number, name in enumerate(NAMES):
        write(folder / name, jpeg(100 + number))
    found = of_records(folder, *({"image_path": name, "caption": f"Of {name}"} for name in names))
    assert reasons(found) == []
    assert len({entry.id for entry in found.images.entries}) == len(NAMES)
    shown = {sample["turns"][0]["text"]: found.images.read_bytes(sample["images"][0]) for sample in found.samples}
    assert shown == {" ".join(f"Of {name}".split()): (folder / name).read_bytes() for name in NAMES[:-1]} | {
        "Of a b.jpg": shown["Of a b.jpg"]
    }


def test_given_ids_may_differ_in_case_and_one_id_still_names_one_picture(folder):
    rows = [["a", "0.jpg", "A."], ["A", "1.jpg", "B."], ["a", "0.jpg", "C."], ["a", "2.jpg", "D."]]
    found = of_table(folder, rows, "image_id,image_path,caption")
    assert [sample["id"] for sample in found.samples] == ["a", "A", "a"]
    assert reasons(found) == ["duplicate_id"]


# --- pictures as people write them -------------------------------------------------------------


def test_pictures_inside_records_are_read_in_every_usual_way(folder):
    data = base64.b64encode(jpeg(0)).decode()
    found = of_records(
        folder,
        {"image": {"bytes": data, "path": None}, "caption": "A dog."},
        {"image": data, "caption": "A dog."},
        {"image": f"data:image/jpeg;base64,{data}", "caption": "A dog."},
        {"image": {"path": "0.jpg", "bytes": None}, "caption": "A dog."},
        {"images": [], "image": "0.jpg", "caption": "A dog."},
        {"image": ["0.jpg"], "caption": ["A dog."]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
            ]
        },
    )
    assert reasons(found) == []
    assert answers(found) == ["A dog."] * 7
    assert {sample["images"][0] for sample in found.samples} == {found.samples[0]["images"][0]}
    assert found.summary["ignored_keys"] == {}


def test_ids_that_pandas_made_floats_are_whole_numbers(folder):
    found = of_records(folder, {"image_id": 17.0, "image": "0.jpg", "caption": "A."}, {"image_id": float("nan"),
                       "image": "1.jpg", "caption": "B."}, chat("<image>?", "C.", "2.jpg", id=3.0))  # fmt: skip
    assert [sample["id"] for sample in found.samples] == ["17", "1.jpg", "3"]


def test_a_long_picture_in_base64_is_never_printed_whole(folder):
    broken = base64.b64encode(encode(picture(1, (300, 200)), "PNG")).decode()[:-400]
    records = [
        {"image": broken, "caption": "A."},
        {"image": 3 * [broken], "caption": "A."},
        {"caption": "A.", "picture_data": broken},
        {"messages": broken, "image": "0.jpg"},
    ]
    found = of_records(folder, *records, chat("<image>?", "A dog."))
    assert len(found.rejected_samples) == 4
    assert found.rejected_samples["detail"].str.len().max() < 500
    assert found.rejected_samples["image_id"].str.len().max() < 300
