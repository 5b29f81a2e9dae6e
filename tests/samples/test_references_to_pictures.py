"""`image.storage: reference`: pictures stay where they are, and are used only as long as they are what was read."""

import hashlib
import os

import numpy as np
import pytest
from kedro.io import Version

from qwen_vl_lora.datasets.images import ImageStoreDataset
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.artifacts import describe_artifact, fault_of
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.image_stage import DataFolders, ImageStage
from qwen_vl_lora.samples.records import RowError, SourceSample, Turn
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)

REFERENCE = image_parameters(storage="reference")


def collected(folder, image, paths):
    """Two captions of each file, and one of a picture that is no file."""
    rows = [
        *(SourceSample(2 * row + more, str(row), (path,), (Turn("assistant", f"Text {row} {more}."),))
          for row, path in enumerate(paths) for more in (0, 1)),
        SourceSample(99, "bytes", (jpeg(99),), (Turn("assistant", "No file."),)),
    ]  # fmt: skip
    return collect(rows, workspace_folder(folder), captions_parameters(), image, quarantine_parameters())


@pytest.fixture
def paths(tmp_path):
    return [write(tmp_path / f"{seed}, a.jpg", jpeg(seed)) for seed in range(3)]


@pytest.fixture
def stored(tmp_path, paths) -> ImageStoreDataset:
    """The `images` dataset with referred pictures, saved."""
    store = collected(tmp_path, REFERENCE, paths).images
    dataset = ImageStoreDataset(filepath=str(store.published.parent / "manifest.csv"), version=Version(None, "v1"))
    dataset.save(store)
    return dataset


def rewrite(path, data: bytes) -> None:
    """Other bytes at another time, whatever the clock's grain."""
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def test_only_the_place_of_the_bytes_differs_from_copies(tmp_path, paths, stored):
    one, other = collected(tmp_path, REFERENCE, paths), collected(tmp_path, image_parameters(), paths)
    assert one.samples == other.samples
    assert list(one.caption_table) == list(other.caption_table)
    prompt = prompt_parameters()
    assert build_conversations(one.samples, stored.load(), prompt) == build_conversations(
        other.samples, other.images, prompt
    )
    loaded = stored.load()
    for entry, copied in zip(loaded, other.images, strict=True):
        assert entry[:7] == copied[:7]
        assert hashlib.sha256(loaded.read_bytes(entry.sha256)).hexdigest() == copied.sha256
    assert np.array_equal(loaded.looks, other.images.looks)


def test_the_manifest_keeps_place_size_and_time_and_only_bytes_that_are_no_file_are_stored(paths, stored):
    *referred, no_file = stored.load()
    facts = [path.stat() for path in paths]
    assert [(entry.source, entry.bytes, entry.modified) for entry in referred] == [
        (str(path), fact.st_size, fact.st_mtime_ns) for path, fact in zip(paths, facts, strict=True)
    ]
    assert no_file.source == ""
    assert [file.name for file in stored.load().files.iterdir()] == [no_file.file_name]


def test_a_picture_that_was_only_touched_is_hashed_again_and_used(paths, stored, tmp_path):
    artifact = describe_artifact("images", stored.existing_path(), tmp_path, None)
    os.utime(paths[0], ns=(1, 1))
    stored.check()
    assert fault_of(artifact, tmp_path) is None
    rewrite(paths[0], jpeg(7))
    assert "0, a.jpg has different bytes" in fault_of(artifact, tmp_path)


@pytest.mark.parametrize("same_size", [True, False])
def test_other_bytes_stop_a_run_before_its_first_node_and_when_they_are_read(paths, stored, same_size):
    data = bytearray(paths[1].read_bytes())
    data[-10] ^= 1
    rewrite(paths[1], bytes(data) if same_size else jpeg(8, (80, 60)))
    with pytest.raises(DataFormatError, match=r"1, a\.jpg has other bytes than when data_engineering read it"):
        stored.check()
    store = stored.load()
    with pytest.raises(DataFormatError, match=r"1, a\.jpg has other bytes"):
        store.read_bytes(store.by_id("1").sha256)


@pytest.mark.parametrize("instead", ["nothing", "a pipe"])
def test_a_picture_that_is_gone_is_named(paths, stored, instead):
    paths[2].unlink()
    if instead == "a pipe":
        os.mkfifo(paths[2])
    with pytest.raises(MissingArtifactError, match=r"2, a\.jpg is missing; image.storage: reference left it"):
        stored.check()
    store = stored.load()
    with pytest.raises(MissingArtifactError, match=r"2, a\.jpg is missing"):
        store.read_bytes(store.by_id("2").sha256)


def test_a_picture_that_changes_between_two_rows_rejects_the_second_one(tmp_path, paths):
    stage = ImageStage(DataFolders.of(workspace_folder(tmp_path)), REFERENCE, [])
    first = stage.add(paths[0])
    os.utime(paths[0], ns=(1, 1))
    assert stage.add(paths[0]) == first
    rewrite(paths[0], jpeg(9))
    os.utime(paths[0], ns=(2, 2))
    with pytest.raises(RowError, match=r"0, a\.jpg: The file changed since an earlier row") as fault:
        stage.add(paths[0])
    assert fault.value.reason == "changed_image"


def test_a_picture_that_changes_before_the_images_are_saved_stops_the_run(tmp_path, paths):
    store = collected(tmp_path, REFERENCE, paths).images
    rewrite(paths[0], jpeg(9))
    with pytest.raises(Exception, match=r"0, a\.jpg has other bytes"):
        ImageStoreDataset(filepath=str(store.published.parent / "manifest.csv")).save(store)


def test_a_name_that_is_no_utf8_is_copied(tmp_path):
    path = write(tmp_path / os.fsdecode(b"\xe9.jpg"), jpeg())
    assert ImageStage(DataFolders.of(workspace_folder(tmp_path)), REFERENCE, []).add(path).source == ""
