"""Files as people have them, of the kinds that were once read wrongly or refused without reason, made here in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.collection import Collected, collect
from qwen_vl_lora.samples.places import open_place
from samples.pictures import captions_parameters, image_parameters, jpeg, quarantine_parameters, workspace_folder, write

ROWS = 3
DISC = "A red disc."


class Kind(NamedTuple):
    """A file of some lines, and what becomes of them."""

    content: str
    kept: int
    rejected: dict[str, int]
    first: str = ""
    name: str = "file"


def lines(record: dict[str, Any], number: int = ROWS) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for _ in range(number))


def asked(question: Any, answer: Any = DISC, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": ["p/0.jpg"], **more}


def coco_with_flags() -> str:
    return json.dumps(
        {
            "images": [{"id": number, "file_name": "p/0.jpg"} for number in range(ROWS)],
            "annotations": [
                {"image_id": number, "caption": DISC, "is_rejected": number == 1, "is_precanned": False}
                for number in range(ROWS)
            ],
        }
    )


KINDS = {
    "grounding": Kind(
        lines(asked("<image>Where?", "<bbox>", objects={"bbox": [[4, 4, 20, 30]]})), 0, {"unsupported_content": ROWS}
    ),
    "preference": Kind(lines(asked("<image>What?", label=False)), 0, {"unsupported_content": ROWS}),
    "numbered_mark": Kind(
        lines(
            {
                "image": "p/0.jpg",
                "conversations": [{"from": "human", "value": "<image_1>"}, {"from": "gpt", "value": DISC}],
            }
        ),
        0,
        {"unsupported_content": ROWS},
    ),
    "mark_in_answer": Kind(
        lines({"images": ["p/0.jpg"], "messages": [{"role": "assistant", "content": f"<image>{DISC}"}]}), ROWS, {}, DISC
    ),
    "line_breaks": Kind(lines(asked("<image>Where?", '{\n    "a": [4]\n}')), ROWS, {}, '{\n    "a": [4]\n}'),
    "list_as_text": Kind(f"image_path,caption\np/0.jpg,\"['{DISC}', 'Again.']\"\n", 2, {}, DISC),
    "flags_of_the_set": Kind(coco_with_flags(), 2, {"rejected_by_source": 1}, DISC),
    "unusual_blanks": Kind(
        f"image_path,caption\np/at 9.41\u202fAM.jpg,{DISC}\np/写真\u30001.jpg,{DISC}\n", 2, {}, DISC
    ),
    "two_user_messages": Kind(
        lines(
            {
                "messages": [
                    {"role": "user", "content": "Describe."},
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "p/0.jpg"}}]},
                    {"role": "assistant", "content": DISC},
                ]
            }
        ),
        ROWS,
        {},
        DISC,
    ),
    "images_empty_beside_image": Kind(lines({"images": [], "image": "p/0.jpg", "caption": DISC}), ROWS, {}, DISC),
    "sep_line": Kind(f"sep=;\nimage_path;caption\np/0.jpg;{DISC}\n", 1, {}, DISC),
    "ids_that_fall_together": Kind(
        f"image_path,caption\np/dog.jpg,{DISC}\np/Dog.jpg,{DISC}\nq/r.jpg,{DISC}\nq__r.jpg,{DISC}\n", 4, {}, DISC
    ),
    "image_and_caption": Kind(f"image,caption\np/0.jpg,{DISC}\n", 1, {}, DISC),
    "imagefolder": Kind(lines({"file_name": "p/0.jpg", "text": DISC}), ROWS, {}, DISC),
    "token_file": Kind(f"p/0.jpg#0\t{DISC}\np/0.jpg#1\tAgain.\n", 2, {}, DISC, "Flickr8k.token.txt"),
    "prompt_and_completion": Kind(
        lines(
            {
                "images": ["p/0.jpg"],
                "prompt": [{"role": "user", "content": "Describe."}],
                "completion": [{"role": "assistant", "content": DISC}],
            }
        ),
        ROWS,
        {},
        DISC,
    ),
    "karpathy": Kind(
        json.dumps(
            {"images": [{"filepath": "p", "filename": "0.jpg", "split": "restval", "sentences": [{"raw": DISC}]}]}
        ),
        1,
        {},
        DISC,
    ),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    names = ("p/0.jpg", "p/at 9.41\u202fAM.jpg", "p/写真\u30001.jpg", "p/dog.jpg", "p/Dog.jpg", "q/r.jpg", "q__r.jpg")
    for seed, name in enumerate(names):
        write(tmp_path / name, jpeg(seed))
    return tmp_path


def gather(place: Path, project: Path) -> Collected:
    return collect(
        open_place(str(place)),
        workspace_folder(project / "project"),
        captions_parameters(),
        image_parameters(allowed_roots=[str(project)]),
        quarantine_parameters(1.0),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_is_kept_or_rejected_as_it_means(kind, folder):
    content, kept, rejected, first, name = KINDS[kind]
    file = write(folder / name, content.encode())
    if not kept:
        with pytest.raises(DataFormatError, match=f"By reason: {next(iter(rejected))} {ROWS}"):
            gather(file, folder)
        return
    collected = gather(file, folder)
    assert collected.rejected_samples["reason"].value_counts().to_dict() == rejected
    assert len(collected.samples) == kept
    assert collected.samples[0]["turns"][-1]["text"] == first


def test_turns_of_weight_0_are_kept_and_not_scored(folder):
    record = asked("<image>What?", "BAD ANSWER")
    record["messages"][1]["weight"] = 0
    record["messages"] += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": DISC}]
    (sample,) = gather(write(folder / "f", lines(record, 1).encode()), folder).samples
    scored = {turn["text"]: turn.get("loss", True) for turn in sample["turns"] if turn["role"] == "assistant"}
    assert scored == {"BAD ANSWER": False, DISC: True}


def test_anthropics_pictures_in_base64_are_read(folder):
    import base64

    source = {"type": "base64", "media_type": "image/jpeg", "data": base64.b64encode(jpeg()).decode()}
    record = asked([{"type": "image", "source": source}, {"type": "text", "text": "What?"}])
    del record["images"]
    assert len(gather(write(folder / "f", lines(record).encode()), folder).samples) == ROWS


def test_a_git_lfs_pointer_is_named(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    with pytest.raises(DataFormatError, match="a Git LFS pointer, not the file itself"):
        gather(write(folder / "c.csv", pointer), folder)


def test_a_folder_of_pictures_with_texts_beside_them_is_the_source_itself(folder):
    for number in range(3):
        write(folder / "s" / f"{number}.jpg", jpeg(number))
        write(folder / "s" / f"{number}.txt", DISC.encode())
    collected = gather(folder / "s", folder)
    assert [sample["turns"][-1]["text"] for sample in collected.samples] == [DISC] * 3
