"""The bad inputs that people bring, each with its exact reason, from files on disk to `rejected_samples`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.sources import CaptionsFile
from qwen_vl_lora.samples.splitting import split_conversations
from samples.pictures import (
    animation,
    captions_parameters,
    encode,
    image_parameters,
    jpeg,
    picture,
    png,
    png_of_declared_size,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)

BAD_IMAGES: dict[str, tuple[bytes | None, str]] = {
    "missing.jpg": (None, "missing_image"),
    "empty.jpg": (b"", "empty_file"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "not_an_image"),
    "cut.jpg": (jpeg(1, (200, 200))[:-2000], "damaged_image"),
    "cut.png": (png(2, (200, 200))[:-2000], "damaged_image"),
    "nothing.png": (png_of_declared_size(0, 9), "zero_size_image"),
    "bomb.png": (png_of_declared_size(60_000, 60_000), "too_many_pixels"),
    "thin.png": (png(3, (402, 2)), "extreme_aspect_ratio"),
    "moving.gif": (animation("GIF"), "animated_image"),
    "vector.eps": (encode(picture(), "EPS"), "unsupported_format"),
    "paper.pdf": (encode(picture(), "PDF"), "unsupported_format"),
    "drawing.svg": (b'<?xml version="1.0"?><svg xmlns="x"/>', "unsupported_format"),
    "scan.tiff": (encode(picture(), "TIFF"), "unsupported_format"),
    # A directory of 65,535 entries at an offset outside of the file: decoders of TIFF were killed by such.
    "bomb.tiff": (b"II*\x00\xff\xff\xff\x7f" + b"\xff" * 64, "unsupported_format"),
}
GOOD_IMAGES = {
    "pixel.png": encode(Image.new("RGB", (1, 1)), "PNG"),
    "print.jpg": encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"),
    "scan.png": encode(Image.new("I;16", (8, 8), 999), "PNG"),
    "veil.png": encode(Image.new("LA", (8, 8), (9, 9)), "PNG"),
    "few.png": encode(picture(4).convert("P"), "PNG", transparency=0),
}
BAD_CAPTIONS = {
    "": "empty_caption",
    "   ": "empty_caption",
    "\n\n": "empty_caption",
    "\x01\x02": "empty_caption",
    "nan": "empty_caption",
    "A dog.<|im_end|>": "special_token",
    "A dog.<|image_pad|>": "special_token",
    "x" * 1_000_000: "caption_too_long",
}
BAD_REFERENCES = {
    "https://example.org/a.jpg": "url_not_allowed",
    "../../outside/a.jpg": "outside_allowed_roots",
    "link.jpg": "outside_allowed_roots",
    "/etc/hostname": "outside_allowed_roots",
}
BAD_IDS = [
    ("one", "good.jpg", None),
    ("one", "pixel.png", "duplicate_id"),
    ("ONE", "good.jpg", None),
    ("Café", "good.jpg", None),
    ("Cafe\u0301", "good.jpg", None),
    ("a/b", "good.jpg", None),
    ("a\tb", "good.jpg", "bad_id"),
    ("a<|im_end|>", "good.jpg", "bad_id"),
    ("x" * 1001, "good.jpg", "bad_id"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures, good and bad, in a project of their own."""
    folder = tmp_path / "project" / "mine"
    for name, (data, _) in BAD_IMAGES.items():
        if data is not None:
            write(folder / name, data)
    for name, data in {**GOOD_IMAGES, "good.jpg": jpeg(9)}.items():
        write(folder / name, data)
    write(tmp_path / "project" / ".." / "outside" / "a.jpg", jpeg(8))
    (folder / "link.jpg").symlink_to(tmp_path / "outside" / "a.jpg")
    return folder


def collected_from(file: Path):
    return collect(
        CaptionsFile(file),
        workspace_folder(file.parents[1]),
        captions_parameters(),
        image_parameters(),
        quarantine_parameters(1.0),
    )


def csv_of(*rows: tuple[str, ...], header: str) -> bytes:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    return "\n".join([header, *quoted]).encode()


def reasons(collected) -> dict[int, str]:
    table = collected.rejected_samples
    assert (table["detail"].str.len() > 0).all()
    return dict(zip(table["row"], table["reason"], strict=True))


def assert_each_row_once(collected, rows: int) -> None:
    assert len(collected.samples) + len(collected.rejected_samples) == rows


def test_each_bad_picture_has_its_reason_and_the_good_ones_go_on(folder):
    names = [*BAD_IMAGES, *GOOD_IMAGES]
    file = write(folder / "c.csv", csv_of(*((name, f"Of {name}.") for name in names), header="image_path,caption"))
    collected = collected_from(file)
    expected = {row: reason for row, (_, reason) in enumerate(BAD_IMAGES.values(), start=1)}
    assert reasons(collected) == expected
    assert [sample["id"] for sample in collected.samples] == list(GOOD_IMAGES)
    assert_each_row_once(collected, len(names))


def test_each_bad_caption_has_its_reason(folder):
    file = write(folder / "c.csv", csv_of(*(("good.jpg", text) for text in BAD_CAPTIONS), header="image_path,caption"))
    write(file, b"\xef\xbb\xbf" + file.read_bytes() + b"\ngood.jpg,A dog." + b"\ngood.jpg,caf\xe9")
    collected = collected_from(file)
    expected = dict(enumerate([*BAD_CAPTIONS.values(), None, "bad_encoding"], start=1))
    assert reasons(collected) == {row: reason for row, reason in expected.items() if reason}
    assert_each_row_once(collected, len(expected))


def test_each_bad_reference_has_its_reason(folder):
    rows = [*((reference, "A dog.") for reference in BAD_REFERENCES), ("good.jpg", "A dog.")]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_path,caption")))
    assert reasons(collected) == dict(enumerate(BAD_REFERENCES.values(), start=1))


def test_each_bad_id_has_its_reason(folder):
    rows = [(image_id, name, "A dog.") for image_id, name, _ in BAD_IDS]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_id,image_path,caption")))
    expected = {row: reason for row, (_, _, reason) in enumerate(BAD_IDS, start=1) if reason}
    assert reasons(collected) == expected


def turns(*spoken: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in spoken], "images": ["good.jpg"]}


BAD_RECORDS = [
    ({}, "missing_key"),
    ({"messages": [{"role": "user"}]}, "missing_key"),
    (turns(("teacher", "x"), ("assistant", "y")), "wrong_roles"),
    (turns(("assistant", "y"), ("user", "<image>")), "wrong_roles"),
    (turns(("user", "<image>a"), ("assistant", "b"), ("user", "c")), "odd_turns"),
    (turns(("user", "<image><image>a"), ("assistant", "b")), "placeholder_mismatch"),
    (turns(("user", "<image>a"), ("assistant", "b")) | {"images": ["good.jpg", "pixel.png"]}, "placeholder_mismatch"),
    ({"messages": turns(("user", "<image>a"), ("assistant", "b"))["messages"]}, "placeholder_mismatch"),
    ({"messages": [{"role": "assistant", "content": float("nan")}], "images": ["good.jpg"]}, "empty_caption"),
    (7, "malformed_row"),
]


def test_each_bad_record_has_its_reason(folder):
    lines = [json.dumps(record) for record in [turns(("assistant", "A dog.")), *(record for record, _ in BAD_RECORDS)]]
    collected = collected_from(write(folder / "c.jsonl", "\n".join(lines).encode()))
    assert reasons(collected) == dict(enumerate((reason for _, reason in BAD_RECORDS), start=2))
    assert_each_row_once(collected, len(lines))


def test_a_missing_column_stops_before_any_row(folder):
    with pytest.raises(DataFormatError, match="needs a column for a caption"):
        collected_from(write(folder / "c.csv", b"image_path,note\ngood.jpg,A dog.\n"))


def test_one_picture_under_two_ids_is_on_one_side_of_the_split(folder):
    names = [f"{seed}.jpg" for seed in range(10)]
    for seed, name in enumerate(names):
        write(folder / name, jpeg(seed))
        write(folder / f"copy_of_{name}", jpeg(seed))
    rows = [(name, "A dog.") for name in [*names, *(f"copy_of_{name}" for name in names)]]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_path,caption")))
    conversations = build_conversations(collected.samples, collected.images, prompt_parameters())
    split = split_conversations(
        conversations, collected.images, SplitParameters(test_images=3, validation_images=2, seed=0)
    )
    assert len(split.test) == 6  # three pictures, both ids of each
    assert len(split.validation) == 4
