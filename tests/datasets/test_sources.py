from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
from kedro.io import AbstractDataset, DatasetError

from qwen_vl_lora.samples.records import SourceSample
from samples.pictures import jpeg, write

SOURCES = "qwen_vl_lora.datasets.sources"


def from_catalog(**config) -> AbstractDataset:
    return AbstractDataset.from_config("captioned_images", config)


def test_scenes_are_drawn_lazily_and_again_for_every_iteration():
    rows = from_catalog(type=f"{SOURCES}.ScenesDataset", num_images=10**9, seed=0).load()
    first = list(itertools.islice(rows, 3))
    assert all(isinstance(row, SourceSample) for row in first)
    assert list(itertools.islice(rows, 3)) == first


def test_a_captions_file_is_read(tmp_path):
    file = write(tmp_path / "c.csv", b"image_path,caption\na.jpg,A dog.\n")
    dataset = from_catalog(type=f"{SOURCES}.CaptionsFileDataset", filepath=str(file))
    assert dataset.exists()
    assert [row.turns[0].text for row in dataset.load()] == ["A dog."]


@pytest.mark.parametrize("filepath", [None, ""])
def test_without_a_file_the_catalog_loads_and_reading_says_what_to_give(filepath):
    dataset = from_catalog(type=f"{SOURCES}.CaptionsFileDataset", filepath=filepath)
    assert not dataset.exists()
    assert "filepath" in repr(dataset) or str(dataset)
    with pytest.raises(DatasetError, match=r"--params captions_file=path/to/captions\.csv"):
        dataset.load()


def test_a_file_that_is_not_there_is_named(tmp_path):
    dataset = from_catalog(type=f"{SOURCES}.CaptionsFileDataset", filepath=str(tmp_path / "none.csv"))
    with pytest.raises(DatasetError, match=r"Captions file not found: .*none\.csv"):
        dataset.load()


@pytest.mark.parametrize("filepath", ["~/c.csv", "/project/~/c.csv"])
def test_the_users_folder_is_understood_also_where_kedro_made_the_path_absolute(tmp_path, monkeypatch, filepath):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.csv", b"image_path,caption\na.jpg,A dog.\n")
    dataset = from_catalog(type=f"{SOURCES}.CaptionsFileDataset", filepath=filepath)
    assert dataset.exists()
    assert [row.images for row in dataset.load()] == [(tmp_path / "a.jpg",)]


def test_the_folder_of_coco_pictures_is_relative_to_the_captions(tmp_path):
    write(tmp_path / "train2014" / "a.jpg", jpeg())
    tree = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog."}]}
    file = write(tmp_path / "annotations" / "c.json", json.dumps(tree).encode())
    dataset = from_catalog(type=f"{SOURCES}.CocoCaptionsDataset", filepath=str(file), image_folder="../train2014")
    (row,) = dataset.load()
    assert row.images[0].read_bytes() == jpeg()


def test_a_source_cannot_be_written(tmp_path):
    dataset = from_catalog(type=f"{SOURCES}.CaptionsFileDataset", filepath=str(tmp_path / "c.csv"))
    with pytest.raises(DatasetError, match="is a source: it is read only"):
        dataset.save([])


def test_sources_are_imported_without_torch():
    code = f"import sys, {SOURCES}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
