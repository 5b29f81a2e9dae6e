from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from kedro.io import DatasetError, Version

from qwen_vl_lora.datasets import artifacts, images
from qwen_vl_lora.datasets.images import ImageStoreDataset
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.records import SourceSample, Turn
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    quarantine_parameters,
    workspace_folder,
)


def dataset(project: Path, version: Version | None) -> ImageStoreDataset:
    folder = project / "data" / "02_intermediate" / "tiny" / "images"
    return ImageStoreDataset(filepath=str(folder / "manifest.csv"), version=version)


def staged(project: Path, *seeds: int) -> ImageStore:
    source = [SourceSample(seed, f"i{seed}", (jpeg(seed),), (Turn("assistant", "A dog."),)) for seed in seeds]
    return collect(
        source, workspace_folder(project), captions_parameters(), image_parameters(), quarantine_parameters()
    ).images


def test_a_saved_version_loads_as_a_handle_on_the_same_bytes(tmp_path):
    entry = dataset(tmp_path, Version(None, "v1"))
    entry.save(staged(tmp_path, 1, 2))
    loaded = entry.load()
    assert [loaded.read_bytes(one.sha256) for one in loaded] == [jpeg(1), jpeg(2)]
    assert (tmp_path / loaded.by_id("i1").path).read_bytes() == jpeg(1)


def test_versions_share_bytes_and_differ_in_their_manifests(tmp_path):
    dataset(tmp_path, Version(None, "v1")).save(staged(tmp_path, 1, 2))
    dataset(tmp_path, Version(None, "v2")).save(staged(tmp_path, 2, 3))
    files = tmp_path / "data" / "02_intermediate" / "tiny" / "images" / "files"
    assert sorted(file.stem for file in files.iterdir()) == sorted(
        hashlib.sha256(jpeg(seed)).hexdigest() for seed in (1, 2, 3)
    )
    assert [entry.id for entry in dataset(tmp_path, Version("v1", None)).load()] == ["i1", "i2"]
    assert [entry.id for entry in dataset(tmp_path, Version(None, None)).load()] == ["i2", "i3"]


def test_a_save_that_fails_leaves_no_version(tmp_path):
    store = staged(tmp_path, 1)
    store.file(hashlib.sha256(jpeg(1)).hexdigest()).unlink()
    with pytest.raises(DatasetError, match="neither staged in"):
        dataset(tmp_path, Version(None, "v1")).save(store)
    assert not dataset(tmp_path, Version(None, None)).exists()


def test_a_store_made_for_another_folder_is_refused(tmp_path):
    store = staged(tmp_path / "elsewhere", 1)
    with pytest.raises(DatasetError, match="Take `workspace` and `images` from one catalog"):
        dataset(tmp_path, Version(None, "v1")).save(store)


def test_only_a_store_can_be_saved(tmp_path):
    with pytest.raises(DatasetError, match="an ImageStore was required, came list"):
        dataset(tmp_path, Version(None, "v1")).save([])


def test_a_relative_filepath_and_an_absolute_workspace_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = ImageStoreDataset(filepath="data/02_intermediate/tiny/images/manifest.csv", version=Version(None, "v1"))
    entry.save(staged(tmp_path, 1))
    assert entry.load().verify() is None
    assert [version.name for version in Path("data/02_intermediate/tiny/images/manifest.csv").iterdir()] == ["v1"]


def test_a_broken_manifest_is_named(tmp_path):
    entry = dataset(tmp_path, Version(None, "v1"))
    entry.save(staged(tmp_path, 1))
    Path(entry._get_load_path()).write_text("id\n")
    with pytest.raises((DatasetError, DataFormatError), match="is not a manifest of images"):
        entry.load()


def test_pictures_are_on_the_disk_before_the_manifest_that_names_them_is_visible(tmp_path, monkeypatch):
    events = []
    sync, publish = images.sync_files, artifacts._publish_version

    def note_sync(folder):
        events.append(sorted(path.stem for path in folder.iterdir()))
        sync(folder)

    monkeypatch.setattr(images, "sync_files", note_sync)
    monkeypatch.setattr(artifacts, "_publish_version", lambda *paths: (events.append("version"), publish(*paths)))
    dataset(tmp_path, Version(None, "v1")).save(staged(tmp_path, 1, 2))
    assert events == [sorted(hashlib.sha256(jpeg(seed)).hexdigest() for seed in (1, 2)), "version"]
