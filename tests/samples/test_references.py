from __future__ import annotations

import base64
from pathlib import Path

import pytest

from qwen_vl_lora.samples.records import Address, RowError
from qwen_vl_lora.samples.references import Place, id_from_reference

FOLDER = Path("/data/mine")


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("pics/a.jpg", "/data/mine/pics/a.jpg"),
        ("./pics/a.jpg", "/data/mine/pics/a.jpg"),
        ("/other/a.jpg", "/other/a.jpg"),
        ("file:///other/a%20b.jpg", "/other/a b.jpg"),
        ("file://localhost/other/a.jpg", "/other/a.jpg"),
        ("file:///other/file.jpg", "/other/file.jpg"),
        ("12:30.jpg", "/data/mine/12:30.jpg"),
        ("at noon: a dog.jpg", "/data/mine/at noon: a dog.jpg"),
        ("图片/狗.jpg", "/data/mine/图片/狗.jpg"),
    ],
)
def test_paths_are_relative_to_the_file_unless_absolute(reference, path):
    assert Place(FOLDER).resolve(reference) == Path(path)


def test_the_bytes_of_a_data_uri_are_the_image():
    uri = "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    assert Place(FOLDER).resolve(uri) == b"PNG"


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(range(60))).decode()


@pytest.mark.parametrize(
    "reference",
    [
        JPEG,
        {"bytes": base64.b64decode(JPEG), "path": None},
        {"bytes": JPEG, "path": "a.jpg"},
        {"type": "base64", "media_type": "image/jpeg", "data": JPEG},
        {"url": f"data:image/jpeg;base64,{JPEG}", "detail": "low"},
        {"source": {"type": "base64", "data": JPEG}},
    ],
)
def test_bytes_come_in_any_wrapping(reference):
    assert Place(FOLDER).resolve(reference) == base64.b64decode(JPEG)


def test_an_address_is_read_only_where_it_was_asked_for():
    assert Place(FOLDER, read_addresses=True).resolve("https://e.org/a.jpg") == Address("https://e.org/a.jpg")
    with pytest.raises(RowError, match="image.allow_urls: true and list the hosts in image.url_hosts"):
        Place(FOLDER).resolve("https://e.org/a.jpg")


def test_a_message_never_holds_a_whole_picture():
    with pytest.raises(RowError) as fault:
        Place(FOLDER).resolve({"unknown": JPEG * 1000})
    assert len(str(fault.value)) < 400


@pytest.mark.parametrize(
    ("reason", "reference"),
    [
        ("url_not_allowed", "https://example.org/a.jpg"),
        ("url_not_allowed", "HTTP://example.org/a.jpg"),
        ("url_not_allowed", "ftp://example.org/a.jpg"),
        ("url_not_allowed", "http:example.org/a.jpg"),
        ("url_not_allowed", "s3://bucket/a.jpg"),
        ("missing_image", ""),
        ("bad_encoding", "caf\udce9.jpg"),
        ("damaged_image", "data:image/png;base64,***"),
        ("damaged_image", "data:text/plain,hello"),
    ],
)
def test_other_references_are_rejected(reason, reference):
    with pytest.raises(RowError) as fault:
        Place(FOLDER).resolve(reference)
    assert fault.value.reason == reason


@pytest.mark.parametrize(
    ("reference", "image_id"),
    [
        ("a.jpg", "a.jpg"),
        ("./pics/a.jpg", "pics__a.jpg"),
        ("/data/mine/pics/a.jpg", "pics__a.jpg"),
        ("file:///data/mine/pics/a.jpg", "pics__a.jpg"),
        ("/other/a.jpg", "other__a.jpg"),
        ("data:image/png;base64,AAAA", ""),
        ("", ""),
    ],
)
def test_an_id_names_the_whole_path_below_the_file(reference, image_id):
    assert id_from_reference(reference, FOLDER) == image_id
