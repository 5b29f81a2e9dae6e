"""What real folders and files hold that is odd and not always bad: each is read right, or rejected with its reason."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageCms, PngImagePlugin

from command_line import call, kedro_run, make_project
from qwen_vl_lora.samples.image_files import inspect_image, open_image
from qwen_vl_lora.samples.records import RowError
from reliability.test_quarantine import assert_each_row_once, collected_from, csv_of, reasons
from samples.pictures import encode, image_parameters, jpeg, jpeg_with, picture, png, png_of, write

# --- pictures --------------------------------------------------------------------------------

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DEEP = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 65535, 0)
EXIF = b"Exif\0\0II*\0\x08\0\0\0"


def png_with_text(size: int, times: int = 1) -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(times):
        info.add_text(f"k{number}", "A" * size, zip=True)
    return encode(picture(), "PNG", pnginfo=info)


def orientation(kind: int, count: int, value: bytes) -> bytes:
    """EXIF with the one entry, of any type."""
    return EXIF + struct.pack("<HHHI", 1, 0x0112, kind, count) + value.ljust(4, b"\0") + bytes(4)


READ_AS_THE_PLAIN_ONE = {
    "a phone's JPEG of two views": encode(picture(), "MPO", save_all=True, append_images=[picture(1)]),
    "text behind the end": jpeg() + b"<html>",
    "a profile that is none": jpeg_with(b"ICC_PROFILE\0\1\1garbage", 0xE2),
    "EXIF of 60,000 bytes": jpeg_with(EXIF + bytes(60_000)),
    "EXIF that is cut": jpeg_with(EXIF[:9]),
    "EXIF of noise": jpeg_with(b"Exif\0\0" + b"\xff" * 500),
    "EXIF that leads outside": jpeg_with(b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "a turn of 0": jpeg_with(orientation(3, 1, b"\0")),
    "a turn of 9": jpeg_with(orientation(3, 1, b"\x09")),
    "a turn that is text": jpeg_with(orientation(2, 2, b"6\0")),
    "a turn that is a fraction of nothing": jpeg_with(orientation(5, 1, b"\x08")),
    "XMP that expands": jpeg_with(b"http://ns.adobe.com/xap/1.0/\0<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;&a;</x>"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger", "ignore:Metadata Warning")
@pytest.mark.parametrize("name", READ_AS_THE_PLAIN_ONE)
def test_what_stands_around_a_picture_changes_nothing(name):
    data = READ_AS_THE_PLAIN_ONE[name]
    assert inspect_image(data, image_parameters()) == inspect_image(jpeg(), image_parameters())
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(open_image(jpeg())))


READ_PIXEL_BY_PIXEL = {
    "16 bits a colour": (png_of(2, 1, DEEP, depth=16), [RED, GREEN]),
    "16 bits a colour, one of them clear": (
        png_of(2, 1, DEEP, depth=16, tRNS=struct.pack(">3H", 65535, 0, 0)), [WHITE, GREEN],
    ),
    "16 bits with alpha": (
        png_of(2, 1, b"\0" + struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0), depth=16, colour=6), [RED, WHITE],
    ),
    "16 bits of grey with alpha": (
        png_of(2, 1, b"\0" + struct.pack(">4H", 32768, 65535, 0, 0), depth=16, colour=4), [(128, 128, 128), WHITE],
    ),
    "1 bit": (png_of(2, 1, b"\0\x40", depth=1, colour=0), [(0, 0, 0), WHITE]),
    "1 bit, black clear": (png_of(2, 1, b"\0\x40", depth=1, colour=0, tRNS=b"\0\0"), [WHITE, WHITE]),
    "1 bit, all of it clear": (png_of(2, 1, b"\0\x00", depth=1, colour=0, tRNS=b"\0\0"), [(0, 0, 0)] * 2),
    "2 bits": (png_of(2, 1, b"\0\x10", depth=2, colour=0), [(0, 0, 0), (85, 85, 85)]),
    "a palette of 4 bits": (png_of(2, 1, b"\0\x10", depth=4, colour=3, PLTE=bytes([*GREEN, *RED])), [RED, GREEN]),
    "a palette with half of a veil": (
        png_of(2, 1, b"\0\1\0", colour=3, PLTE=bytes([*GREEN, *RED]), tRNS=b"\0\x80"), [(255, 127, 127), WHITE],
    ),
    "a profile that is no zlib": (png_of(1, 1, b"\0\xff\0\0", iCCP=b"x\0\0none"), [RED]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ_PIXEL_BY_PIXEL)
def test_every_depth_and_palette_is_read_right(name):
    data, pixels = READ_PIXEL_BY_PIXEL[name]
    inspect_image(data, image_parameters())
    opened = open_image(data)
    assert [opened.getpixel((x, 0)) for x in range(len(pixels))] == pixels


def test_cmyk_with_a_profile_is_read_as_without():
    plain, profiled = (
        encode(picture().convert("CMYK"), "JPEG", quality=95, **more) for more in ({}, {"icc_profile": SRGB})
    )
    assert np.array_equal(np.asarray(open_image(plain)), np.asarray(open_image(profiled)))
    assert np.abs(np.asarray(open_image(plain), int) - np.asarray(picture(), int)).mean() < 3


REJECTED = {
    "TIFF of two pages": (encode(picture(), "TIFF", save_all=True, append_images=[picture(1)]), "unsupported_format"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(64), "unsupported_format"),
    "AVIF": (encode(picture(), "AVIF"), "unsupported_format"),
    "JPEG XL": (b"\xff\x0a" + bytes(64), "unsupported_format"),
    "JPEG XL in its box": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "unsupported_format"),
    "JPEG 2000": (encode(picture(), "JPEG2000"), "unsupported_format"),
    "a video (MP4)": (b"\0\0\0\x18ftypisom" + bytes(64), "unsupported_format"),
    "a video (Matroska)": (b"\x1aE\xdf\xa3" + bytes(64), "unsupported_format"),
    "a video (AVI)": (b"RIFF\0\0\0\0AVI LIST", "unsupported_format"),
    "PPM": (encode(picture(), "PPM"), "unsupported_format"),
    "QOI": (encode(picture(), "QOI"), "unsupported_format"),
    "DDS": (encode(picture(), "DDS"), "unsupported_format"),
    "an icon": (encode(picture(), "ICO"), "unsupported_format"),
    "a camera's raw file": (b"II*\0\x10\0\0\0CR\2\0", "unsupported_format"),
    "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "not_an_image"),
    "an answer of a server": (b'{"error": "not found"}', "not_an_image"),
    "a zip": (b"PK\3\4" + bytes(64), "not_an_image"),
    "a picture behind a line feed": (b"\n" + jpeg(), "not_an_image"),
    "three bytes": (b"\xff\xd8\xff", "damaged_image"),
    "no end of JPEG": (jpeg()[:-2], "damaged_image"),
    "no end of PNG": (png()[:-12], "damaged_image"),
    "a text of 300 MB in 300 kB": (lambda: png_with_text(300_000_000), "damaged_image"),
    "a hundred texts of 900 kB": (lambda: png_with_text(900_000, 100), "damaged_image"),
    "a profile of 200 MB": (
        lambda: png_of(1, 1, bytes(4), iCCP=b"x\0\0" + zlib.compress(bytes(2 * 10**8))), "damaged_image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_every_other_thing_has_its_reason(name):
    data, reason = REJECTED[name]
    data = data() if callable(data) else data  # what is large is made by its own test alone
    with pytest.raises(RowError) as fault:
        inspect_image(data, image_parameters())
    assert fault.value.reason == reason
    if name.startswith("a video"):
        assert f"The picture is {name.partition(' (')[0]}" in fault.value.detail


def test_rows_beyond_a_picture_are_not_unpacked():
    """500 MB of zeros behind a picture of 10 by 10: read as the picture, the rest is left packed."""
    data = png_of(10, 10, bytes(500_000_000))
    assert inspect_image(data, image_parameters()).width == 10


# --- names -----------------------------------------------------------------------------------

GOOD_NAMES = [
    "b c.jpg", "it's.jpg", 'q"uote.jpg', "com,ma.jpg", "semi;colon.jpg", "-dash.jpg", "--params.jpg", "#hash.jpg",
    "100%.jpg", "a%20b.jpg", "q?x=1.jpg", "<img src=x>.jpg", "=1+1.jpg", "@x.jpg", "😀.jpg", "Café.jpg", "图.jpg",
    "no_suffix", "picture.txt", "C:drive.jpg", "colon:name.jpg", ".hidden.jpg", "x" * 240 + ".jpg", "$HOME.jpg",
    "sub/dir/a.jpg", "back\\slash.jpg", "{{7*7}}.jpg", "NaN", "null.jpg", "new\nline.jpg", "tab\there.jpg",
    "rtl\u202egpj.jpg", "zero\u200bwidth.jpg", "<|im_end|>.jpg", "sub__dir__a.jpg",
]  # fmt: skip
BAD_NAMES = {
    "nul\0.jpg": ("missing_image", "Invalid file name"),
    "y" * 300 + ".jpg": ("unreadable_file", "File name too long"),
    "Cafe\u0301.jpg": ("missing_image", r"mine/Caf\xe9.jpg"),
    "sub\\dir\\a.jpg": ("missing_image", "A file exists with slashes: /"),
    "A.jpg": ("missing_image", "File not found."),
    "~/b c.jpg": ("missing_image", "File not found."),
    "sub/dir": ("unreadable_file", "Is a directory"),
    "sftp://host/a.jpg": ("url_not_allowed", "is not a local path"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "project" / "mine"
    for seed, name in enumerate(GOOD_NAMES):
        write(folder / name, jpeg(seed))
    return folder


def test_good_pictures_of_any_name_are_kept(folder):
    rows = [(name, f"Of {number}.") for number, name in enumerate(GOOD_NAMES)]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_path,caption")))
    assert reasons(collected) == {}
    assert [sample["turns"][0]["text"] for sample in collected.samples] == [text for _, text in rows]
    for sample, name in zip(collected.samples, GOOD_NAMES, strict=True):
        assert collected.images.read_bytes(sample["images"][0]) == (folder / name).read_bytes()


def test_names_that_cannot_be_used_say_why(folder):
    rows = [*((name, "A dog.") for name in BAD_NAMES), (GOOD_NAMES[0], "A dog.")]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_path,caption")))
    table = collected.rejected_samples
    assert table["reason"].tolist() == [reason for reason, _ in BAD_NAMES.values()]
    for detail, (_, words) in zip(table["detail"], BAD_NAMES.values(), strict=True):
        assert words in detail


# --- texts -----------------------------------------------------------------------------------

KEPT_TEXTS = [
    "<b>A</b> &amp; <script>alert(1)</script>", "**A** [dog](javascript:alert(1))", "=cmd|' /C calc'!A0", "@SUM(1)",
    "A \u202edog\u202c.", "A\u200bdog", "نمی\u200cخواهم", "👩\u200d👩\u200d👧", "1️⃣", "。",
    "A <span> of a dog", "{{ 7 * 7 }}", "%s", "A 5\" dog", "<|im_end", "A \ufffd dog",
]  # fmt: skip
BLANK_TEXTS = [
    "\u200b\u200c", "\u202e", "\u200d", "\u00a0\u3000", "\u2028\u2029", "\ufe0f", "\u0301", "\u3164", "\u2800",
    "\U000e0041", "\x00", "\x0b\x0c", "\ufeff", "\uffff", " NaN ", "null", "None", "N/A", "#REF!",
]  # fmt: skip


def test_texts_of_any_kind_are_kept_as_they_are_and_those_that_show_nothing_are_empty(folder):
    rows = [(GOOD_NAMES[0], text) for text in [*KEPT_TEXTS, *BLANK_TEXTS]]
    collected = collected_from(write(folder / "c.csv", csv_of(*rows, header="image_path,caption")))
    assert [sample["turns"][0]["text"] for sample in collected.samples] == KEPT_TEXTS
    assert collected.caption_table.frame()["caption"].tolist() == KEPT_TEXTS
    assert set(reasons(collected).values()) == {"empty_caption"}
    assert_each_row_once(collected, len(rows))


def caption(content: object, **keys: object) -> dict:
    return {"messages": [{"role": "assistant", "content": content}], "images": ["b c.jpg"], **keys}


def question(content: str) -> dict:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A dog."}]}


ODD_RECORDS = [
    (caption("A \ud83d\ude00 dog."), None),
    (caption("A \ud800 dog."), "bad_encoding"),
    (caption("A dog.", id="\udc00"), "bad_encoding"),
    (caption("A dog.", images=["\udcff.jpg"]), "bad_encoding"),
    (caption(7), "malformed_row"),
    (caption(True), "malformed_row"),
    (caption({"text": "A dog."}), "malformed_row"),
    (caption(["A dog."]), "malformed_row"),
    (caption([]), "empty_caption"),
    (caption(None), "empty_caption"),
    (caption(float("inf")), "malformed_row"),
    (caption("A dog.", id=1.5), "bad_id"),
    (caption("A dog.", id=True), "bad_id"),
    (caption("A dog.", id=""), None),
    (caption("A dog.", id=10**30), None),
    (caption("A dog.", images="b c.jpg"), None),
    (caption("A dog.", images=["b c.jpg", "b c.jpg"]), "placeholder_mismatch"),
    (caption("A dog.", images=[]), "placeholder_mismatch"),
    (caption("A dog.", images=[None]), "malformed_row"),
    (caption("A dog.", images=["data:image/png;base64,%"]), "damaged_image"),
    (caption("A dog.", images=["data:image/png;base64,"]), "empty_file"),
    ([caption("A dog.")], "malformed_row"),
    ({"image": "b c.jpg", "caption": "A dog."}, None),
    ({"picture": "b c.jpg", "caption": "A dog."}, None),
    ({"figure": "b c.jpg", "caption": "A dog."}, "missing_key"),
    ({"messages": [{"role": "Assistant", "content": "A dog."}], "images": ["b c.jpg"]}, None),
    (question("<img>b c.jpg</img>What?"), None),
    (question("<img>gone.jpg</img>What?"), "missing_image"),
    (question("<|vision_start|>b c.jpg"), "special_token"),
    (question("\u200b"), "empty_prompt"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["list", "lines", "lines with a mark and blank lines"])
def test_odd_records_are_read_right_or_have_their_reason(folder, form):
    texts = [json.dumps(record) for record, _ in ODD_RECORDS]
    if form == "list":
        content = f"[{','.join(texts)}]"
    elif form == "lines":
        content = "\n".join(texts)
    else:
        content = "\ufeff\n \n" + "\n\n\r\n".join(texts)
    collected = collected_from(write(folder / "c.json", content.encode()))
    expected = {row: reason for row, (_, reason) in enumerate(ODD_RECORDS, start=1) if reason}
    assert reasons(collected) == expected
    assert_each_row_once(collected, len(ODD_RECORDS))


# --- a whole run -----------------------------------------------------------------------------


def test_a_run_on_an_odd_folder_keeps_the_good_and_lists_every_bad_row(tmp_path):
    """From the command line to the files, where a name that is too long once stopped the look at the sources."""
    project = make_project(tmp_path / "project")
    for seed, name in enumerate(GOOD_NAMES):
        write(project / "mine" / name, jpeg(seed))
    good = [(name, f"=1+{number}") for number, name in enumerate(GOOD_NAMES)]
    bad = [(name, "A dog.") for name in BAD_NAMES]
    write(project / "mine" / "c;1.csv", csv_of(*good, *bad, header="image_path,caption"))
    command = kedro_run(
        "data_engineering",
        env="own_captions",
        captions_file="mine/c;1.csv",
        captions__num_rows=100,
        quarantine__max_share=0.5,
    )
    result = call(command, project)
    assert result.returncode == 0, result.stderr
    (rejected,) = (project / "data/02_intermediate/own_captions/rejected_samples.csv").glob("*/*.csv")
    with rejected.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(int(row["row"]), row["reason"]) for row in rows] == list(
        enumerate((reason for reason, _ in BAD_NAMES.values()), start=len(good) + 1)
    )
    (table,) = (project / "data/02_intermediate/own_captions/caption_table.csv").glob("*/*.csv")
    with table.open(encoding="utf-8", newline="") as lines:
        assert [row["caption"] for row in csv.DictReader(lines)] == [f"'{text}" for _, text in good]
