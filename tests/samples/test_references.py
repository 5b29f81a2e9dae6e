from __future__ import annotations

import base64
from pathlib import Path

import pytest

from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.references import id_from_reference, resolve_reference

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
    assert resolve_reference(reference, FOLDER) == Path(path)


def test_the_bytes_of_a_data_uri_are_the_image():
    uri = "data:image/png;base64," + base64.b64encode(b"PNG").decode()
    assert resolve_reference(uri, FOLDER) == b"PNG"


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
        resolve_reference(reference, FOLDER)
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
