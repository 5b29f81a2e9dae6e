from __future__ import annotations

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.samples.image_files import LOOK_BYTES
from qwen_vl_lora.samples.image_stage import DataFolders, ImageStage
from qwen_vl_lora.samples.image_store import (
    LOOKS_FILE,
    ImageEntry,
    ImageStore,
    publish_files,
    read_manifest,
    write_manifest,
)
from qwen_vl_lora.samples.looks import stack_looks
from samples.pictures import image_parameters, jpeg, png, workspace_folder


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def staged_store(project: Path, pictures: dict[str, bytes]) -> ImageStore:
    folders = DataFolders.of(workspace_folder(project))
    stage = ImageStage(folders, image_parameters(), ())
    staged = {image_id: stage.add(data) for image_id, data in pictures.items()}
    looks = stack_looks({one.sha256: one.look for one in staged.values()})
    entries = [stage.entry(image_id, one) for image_id, one in staged.items()]
    return ImageStore(folders.stage, entries, looks, published=folders.files)


@pytest.fixture
def store(tmp_path) -> ImageStore:
    """Two pictures, one of them under two ids, saved and read back."""
    staged = staged_store(tmp_path, {"a": jpeg(), "b": png(1), "a again": jpeg()})
    publish_files(staged, staged.published)
    write_manifest(staged, tmp_path / "manifest.csv")
    return read_manifest(tmp_path / "manifest.csv", staged.published)


def test_the_manifest_has_one_line_per_id(store, tmp_path):
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert lines[0] == "id,sha256,path,width,height,bytes"
    path = f"data/02_intermediate/tiny/images/files/{sha(jpeg())}.jpg"
    assert lines[1] == f"a,{sha(jpeg())},{path},40,30,{len(jpeg())}"
    assert [line.split(",")[0] for line in lines[1:]] == ["a", "b", "a again"]


def test_iteration_gives_distinct_pictures_in_the_order_of_the_source(store):
    assert [entry.sha256 for entry in store] == [sha(jpeg()), sha(png(1))]
    assert len(store) == 2
    assert len(store.entries) == 3


def test_a_picture_is_found_by_hash_path_and_id(store):
    entry = store.by_id("a again")
    assert entry.sha256 == sha(jpeg())
    assert store.by_path(entry.path).id == store.by_sha256(entry.sha256).id == "a"
    assert sha(jpeg()) in store
    assert store.by_path(f"/moved/elsewhere/{sha(png(1))}.png").id == "b"


@pytest.mark.parametrize("look_up", ["by_sha256", "by_path", "by_id"])
def test_an_unknown_picture_is_named(store, look_up):
    with pytest.raises(DataFormatError, match=r"'nothing'.* is not among the 2 pictures"):
        getattr(store, look_up)("nothing")


def test_bytes_come_back_as_they_were(store):
    assert store.read_bytes(sha(jpeg())) == jpeg()
    assert store.open(sha(png(1))).size == (40, 30)
    store.verify()


def test_a_missing_file_is_named_with_its_remedy(store):
    store.file(sha(jpeg())).unlink()
    with pytest.raises(MissingArtifactError, match=r"\.jpg is missing\. Run `kedro run --pipeline data_engineering`"):
        store.open(sha(jpeg()))
    with pytest.raises(MissingArtifactError, match="is missing"):
        store.verify()


def test_one_flipped_byte_of_the_same_size_is_noticed(store):
    data = bytearray(jpeg())
    data[len(data) // 2] ^= 1
    store.file(sha(jpeg())).write_bytes(data)
    with pytest.raises(DataFormatError, match="was altered"):
        store.open(sha(jpeg()))


def test_publishing_moves_the_stage_and_replaces_a_short_file(tmp_path):
    staged = staged_store(tmp_path, {"a": jpeg(), "b": png()})
    staged.published.mkdir(parents=True)
    (staged.published / staged.by_id("a").file_name).write_bytes(b"short")
    publish_files(staged, staged.published)
    assert (staged.published / staged.by_id("a").file_name).read_bytes() == jpeg()
    assert not list(staged.files.iterdir())


def test_publishing_twice_is_harmless(tmp_path):
    first = staged_store(tmp_path, {"a": jpeg()})
    second = staged_store(tmp_path, {"a": jpeg()})
    publish_files(first, first.published)
    publish_files(second, second.published)
    assert (second.published / second.by_id("a").file_name).read_bytes() == jpeg()


def test_publishing_notices_what_vanished_from_the_stage(tmp_path):
    staged = staged_store(tmp_path, {"a": jpeg()})
    staged.file(sha(jpeg())).unlink()
    with pytest.raises(DataFormatError, match="neither staged in"):
        publish_files(staged, staged.published)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("id,sha256\n", id="other columns"),
        pytest.param("", id="empty"),
        pytest.param("id,sha256,path,width,height,bytes\na,b,c/b.jpg,wide,1,1\n", id="no number"),
        pytest.param("id,sha256,path,width,height,bytes\na,b\n", id="short line"),
        pytest.param("id,sha256,path,width,height,bytes\na,b,c/other.jpg,1,1,1\n", id="path of another picture"),
        pytest.param("id,sha256,path,width,height,bytes\na,\xff", id="not UTF-8"),
    ],
)
def test_a_file_that_is_no_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataFormatError, match=r"manifest\.csv is not a manifest of images"):
        read_manifest(tmp_path / "manifest.csv", tmp_path)


def test_missing_or_foreign_looks_are_named(store, tmp_path):
    np.save(tmp_path / LOOKS_FILE, np.zeros((5, 1), dtype=np.uint64))
    with pytest.raises(DataFormatError, match=f"must contain {LOOK_BYTES} bytes for each of 2 pictures"):
        _ = store.looks
    (tmp_path / LOOKS_FILE).unlink()
    with pytest.raises(MissingArtifactError, match=r"looks\.npy is missing"):
        _ = store.looks


def test_the_time_to_load_grows_with_the_number_of_entries_only(tmp_path):
    def seconds(count):
        shas = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
        entries = [ImageEntry(f"i{n}", one, "data/files", ".jpg", 640, 480, n) for n, one in enumerate(shas)]
        looks = np.zeros((len(entries), LOOK_BYTES // 8), dtype=np.uint64)
        write_manifest(ImageStore(tmp_path, entries, looks), tmp_path / "manifest.csv")
        started = time.process_time()
        loaded = read_manifest(tmp_path / "manifest.csv", tmp_path)
        taken = time.process_time() - started
        assert loaded.entries == entries
        return taken

    assert seconds(100_000) < 60 * seconds(5_000)  # 20 times; 400 times if it grew with the square
