"""Pictures that a user names: whatever lies in a folder or stands in a table is captioned or has its reason."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.datasets.tables import SpreadsheetCSVDataset
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, QwenVLLoraError
from qwen_vl_lora.samples.named_pictures import gather_pictures
from samples.pictures import image_parameters, jpeg, write


def outcomes(*places: Path, **how) -> dict[str, str]:
    """The reason of each picture by its name; empty when it can be captioned."""
    gathered = gather_pictures(places, image_parameters(), **{"recursive": False, **how})
    for picture in gathered.named:
        assert (picture.sha256 is None) == bool(picture.reason)
    return {Path(picture.path).name: picture.reason.partition(":")[0] for picture in gathered.named}


def test_everything_that_is_called_a_picture_is_named(tmp_path):
    folder = tmp_path / "album"
    for seed, name in enumerate(
        ["a b.jpg", "=1+1.jpg", 'c,d".jpg', "new\nline.jpg", "UP.JPG", "😀.png", "-x.jpe", "v.mpo"]
    ):
        write(folder / name, jpeg(seed))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(jpeg(9))
    write(folder / "empty.jpg", b"")
    write(folder / "x.jxl", b"\xff\x0a" + bytes(9))
    write(folder / "notes.txt", b"no picture")
    write(folder / "dir.jpg" / "deeper.jpg", jpeg(10))
    os.mkfifo(folder / "pipe.jpg")
    for name, target in {"link.jpg": "/etc/hostname", "loop.jpg": "loop.jpg", "dangling.jpg": "nowhere"}.items():
        (folder / name).symlink_to(target)
    assert outcomes(folder) == {
        **dict.fromkeys(
            ["a b.jpg", "=1+1.jpg", 'c,d".jpg', "new\nline.jpg", "UP.JPG", "😀.png", "-x.jpe", "v.mpo"], ""
        ),
        "caf\\udce9.jpg": "",
        "empty.jpg": "empty_file",
        "x.jxl": "unsupported_format",
        "dir.jpg": "unreadable_file",
        "pipe.jpg": "unreadable_file",
        "link.jpg": "outside_allowed_roots",
        "loop.jpg": "unreadable_file",
        "dangling.jpg": "missing_image",
    }


def test_names_that_are_no_text_can_be_saved(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / name).write_bytes(jpeg())
    write(tmp_path / "t.csv", b"image_path\ncaf\xe9.jpg\n")
    gathered = gather_pictures([tmp_path, tmp_path / "t.csv"], image_parameters(), recursive=False)
    table = pd.DataFrame({"image_path": [picture.path for picture in gathered.named]})
    SpreadsheetCSVDataset(filepath=str(tmp_path / "out.csv"), save_args={"index": False}).save(table)
    assert (tmp_path / "out.csv").read_text("utf-8").count("caf\\udce9.jpg") == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"image_path\na.jpg\n", {"a.jpg": ""}),
        (b"\xef\xbb\xbfimage_path;note\r\na.jpg;1\r\n", {"a.jpg": ""}),
        (b"image_path\tnote\na.jpg\t1\n", {"a.jpg": ""}),
        (b"note,image_path\nx,a.jpg\nx\n", {"a.jpg": "", "": "missing_key"}),
        (b'image_path,note\na.jpg,1\nb.jpg,"x" y\n', {"a.jpg": "", "": "malformed_row"}),
        (b"image_path,note\na.jpg,1\n,2\n", {"a.jpg": "", "": "missing_image"}),
    ],
)
def test_a_table_is_read_as_a_source_of_captions_is(tmp_path, content, expected):
    write(tmp_path / "a.jpg", jpeg())
    assert outcomes(write(tmp_path / "wanted.csv", content)) == expected


def test_a_table_that_cannot_be_read_is_one_message(tmp_path):
    with pytest.raises(DataFormatError, match="is UTF-16"):
        outcomes(write(tmp_path / "t.csv", "image_path\na.jpg\n".encode("utf-16")))
    with pytest.raises(DataFormatError, match=r"such as image_path; its first line has: place"):
        outcomes(write(tmp_path / "t.csv", b"place\na.jpg\n"))
    with pytest.raises(MissingArtifactError, match=r"Pictures not found: .*gone\.csv"):
        outcomes(tmp_path / "gone.csv")


def test_a_folder_of_links_is_read_where_its_targets_may_be(tmp_path, monkeypatch):
    project, outside = tmp_path / "project", tmp_path / "nas" / "p"
    write(project / "data" / "in.jpg", jpeg(1))
    write(outside / "out.jpg", jpeg(2))
    monkeypatch.chdir(project)
    (album := tmp_path / "album").mkdir()
    for target in (project / "data" / "in.jpg", outside / "out.jpg"):
        (album / target.name).symlink_to(target)
    assert outcomes(album) == {"in.jpg": "", "out.jpg": "outside_allowed_roots"}
    allowed = gather_pictures([album], image_parameters(allowed_roots=["../nas/p"]), recursive=False)
    assert [picture.reason for picture in allowed.named] == ["", ""]


def test_of_several_places_those_that_give_nothing_are_named_and_the_others_go_on(tmp_path):
    write(tmp_path / "a.jpg", jpeg())
    (tmp_path / "empty").mkdir()
    write(tmp_path / "t.csv", b"place\na.jpg\n")
    places = [tmp_path / name for name in ("a.jpg", "empty", "gone.jpg", "t.csv")]
    reasons = {"a.jpg": "", "empty": "missing_image", "gone.jpg": "missing_image", "t.csv": "malformed_row"}
    assert outcomes(*places) == reasons
    with pytest.raises(MissingArtifactError, match="No pictures found in .*empty"):
        outcomes(tmp_path / "empty")


CELLS = st.text(max_size=8) | st.sampled_from(
    ["a.jpg", '"', ",", "https://x.y/z", "../a.jpg", "data:,", "file:a.jpg", "\0"]
)
CONTENTS = st.binary(max_size=80) | st.lists(CELLS, max_size=6).map(
    lambda cells: ("image_path\n" + "\n".join(cells)).encode("utf-8", errors="surrogatepass")
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=CONTENTS)
def test_any_table_names_pictures_or_is_one_message(tmp_path, content):
    write(tmp_path / "a.jpg", jpeg())
    with contextlib.suppress(QwenVLLoraError):
        outcomes(write(tmp_path / "t.csv", content))
