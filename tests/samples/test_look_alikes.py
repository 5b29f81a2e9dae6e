"""A path that is not there is answered with the picture that it nearly names, at a bounded cost."""

from __future__ import annotations

import os

import pytest

from qwen_vl_lora.samples.image_stage import DataFolders, ImageStage
from qwen_vl_lora.samples.look_alikes import MAX_ANSWERS, MAX_LISTINGS
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.references import Place
from samples.pictures import image_parameters, jpeg, workspace_folder, write


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    for name in ("Dog.JPG", "cat.png", "images/bird.jpg", "sub/dir/fish.jpg", "horse 1.jpg", "Café.jpg"):
        write(folder / name, jpeg())
    return folder


def fault_of(reference: str, folder) -> RowError:
    stage = ImageStage(DataFolders.of(workspace_folder(folder.parent / "project")), image_parameters(), [folder])
    with pytest.raises(RowError) as fault:
        stage.add(Place(folder).resolve(reference))
    return fault.value


@pytest.mark.parametrize(
    ("reference", "words", "found"),
    [
        ("dog.jpg", "in another case", "Dog.JPG"),
        ("cat.jpg", "with another ending", "cat.png"),
        ("CAT.jpeg", "with another ending", "cat.png"),
        ("images/cat.png", "in another folder", "cat.png"),
        ("bird.jpg", "in another folder", "images/bird.jpg"),
        ("Images/Bird.jpg", "in another case", "images/bird.jpg"),
        ("C:\\data\\cat.png", "in another folder", "cat.png"),
        ("C:\\Users\\me\\sub\\dir\\fish.jpg", "in another folder", "sub/dir/fish.jpg"),
        ("sub\\dir\\fish.jpg", "with slashes", "sub/dir/fish.jpg"),
        ("/home/somebody/train/cat.png", "in another folder", "cat.png"),
        ("/data/local-files/?d=pictures/horse%201.jpg", "in another folder", "horse 1.jpg"),
        ("/data/upload/3/0a1b2c3d-cat.png", "in another folder", "cat.png"),
        ("Cafe\u0301.jpg", "in another Unicode form", "Caf\\xe9.jpg"),
    ],
)
def test_a_path_that_is_not_there_is_answered_with_what_is(folder, reference, words, found):
    fault = fault_of(reference, folder)
    assert fault.reason == "missing_image"
    assert f"A file exists {words}" in fault.detail
    assert f"/{found}." in fault.detail


def test_a_missing_prefix_is_answered_with_the_folder_to_set(folder):
    assert f"Set image_folder={folder}/images." in fault_of("bird.jpg", folder).detail


@pytest.mark.parametrize("reference", ["/nowhere/at/all.jpg", "../outside.jpg", "gone.jpg"])
def test_a_file_that_is_nowhere_is_missing_and_nothing_to_allow(folder, reference):
    fault = fault_of(reference, folder)
    assert fault.reason == "missing_image"
    assert "allowed_roots" not in fault.detail
    assert "A file exists" not in fault.detail


def test_only_the_first_missing_pictures_of_a_run_are_looked_for(folder, monkeypatch):
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(str(place)) or scandir(place))
    for number in range(300):
        write(folder / f"folder{number}" / "a.jpg", jpeg())
    stage = ImageStage(DataFolders.of(workspace_folder(folder.parent / "project")), image_parameters(), [folder])
    hints = 0
    for number in range(10_000):
        with pytest.raises(RowError) as fault:
            stage.add(folder / f"x{number}" / f"y{number}" / "DOG.jpg")
        hints += "A file exists" in fault.value.detail
    assert hints == MAX_ANSWERS
    assert len(listed) <= MAX_LISTINGS
