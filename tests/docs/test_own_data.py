"""The examples of docs/own-data.md are read as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from kedro.io import AbstractDataset

from docs.blocks import PROJECT, blocks
from qwen_vl_lora.datasets.sources import CaptionsFileDataset, CocoCaptionsDataset
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.sources import CaptionsFile
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    png,
    quarantine_parameters,
    workspace_folder,
    write,
)

PAGE = PROJECT / "docs" / "own-data.md"
FILES = [block for block in blocks("csv", "json") if block.page == PAGE]
ENTRIES = [block for block in blocks("yaml") if block.page == PAGE and "captioned_images" in block.text]
ABSOLUTE = "/data/coco"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with the pictures that the page speaks of."""
    for name, data in {"dogs/1.jpg": jpeg(1), "cats/2.png": png(2), "coco/1.jpg": jpeg(3)}.items():
        write(tmp_path / name, data)
    return tmp_path


def collected(source, project: Path):
    return collect(
        source, workspace_folder(project), captions_parameters(), image_parameters(), quarantine_parameters(0.0)
    )


def test_the_page_shows_each_form():
    assert len(FILES) >= 18
    assert len(ENTRIES) == 4


@pytest.mark.parametrize("block", FILES, ids=lambda block: block.id)
def test_an_example_of_a_file_is_read_without_a_rejected_row(block, pictures):
    text = block.text.replace(ABSOLUTE, str(pictures / "coco"))
    result = collected(CaptionsFile(write(pictures / "example", text.encode())), pictures)
    assert result.samples
    assert result.rejected_samples.empty


@pytest.mark.parametrize("block", ENTRIES, ids=lambda block: block.id)
def test_an_example_of_an_entry_is_a_source(block, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    dataset = AbstractDataset.from_config("captioned_images", yaml.safe_load(block.text)["captioned_images"])
    write(pictures / "my_pictures" / "captions.csv", b"image_path,caption\n../dogs/1.jpg,A dog.\n")
    tree = b'{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "A dog."}]}'
    write(pictures / "data/01_raw/coco/annotations/captions_train2014.json", tree)
    write(pictures / "data/01_raw/coco/train2014/1.jpg", jpeg())
    if not isinstance(dataset, CaptionsFileDataset | CocoCaptionsDataset):
        return  # from the hub: tests/datasets/test_hub.py reads one
    num_sources = block.text.count("captions_train2014.json") + block.text.count("my_pictures/captions.csv")
    assert len(collected(dataset.load(), pictures).samples) == num_sources
