from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_vl_lora.samples import image_stage
from qwen_vl_lora.samples.image_stage import DataFolders, ImageStage
from qwen_vl_lora.samples.records import RowError
from samples.pictures import image_parameters, jpeg, png, workspace_folder, write


def make_stage(project: Path, *source_folders: Path, **limits) -> ImageStage:
    return ImageStage(DataFolders.of(workspace_folder(project)), image_parameters(**limits), source_folders)


def reason_of(stage: ImageStage, image: bytes | Path) -> str:
    with pytest.raises(RowError) as fault:
        stage.add(image)
    return fault.value.reason


def test_bytes_are_staged_by_content_with_the_suffix_of_their_format(tmp_path):
    file = write(tmp_path / "wrong_suffix.png", jpeg())
    staged = make_stage(tmp_path).add(file)
    name = hashlib.sha256(jpeg()).hexdigest() + ".jpg"
    assert (DataFolders.of(workspace_folder(tmp_path)).stage / name).read_bytes() == jpeg()
    assert (staged.width, staged.height, staged.num_bytes) == (40, 30, len(jpeg()))


def test_the_entry_names_the_final_place_relative_to_the_project(tmp_path):
    stage = make_stage(tmp_path)
    entry = stage.entry("a", stage.add(png()))
    sha256 = hashlib.sha256(png()).hexdigest()
    assert entry.path == f"data/02_intermediate/tiny/images/files/{sha256}.png"


def test_each_distinct_picture_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    inspect = image_stage.inspect_image
    monkeypatch.setattr(
        image_stage, "inspect_image", lambda data, limits: decoded.append(data) or inspect(data, limits)
    )
    stage = make_stage(tmp_path)
    files = [write(tmp_path / f"{name}.jpg", jpeg(seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stage.add, [*files, jpeg(0), jpeg(1)] * 20))
    assert sorted(decoded) == sorted([jpeg(0), jpeg(1)])


def test_a_thread_waits_for_the_picture_that_another_has_in_hand(tmp_path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    inspect = image_stage.inspect_image

    def slow(data, limits):
        started.set()
        go_on.wait(10)
        return inspect(data, limits)

    monkeypatch.setattr(image_stage, "inspect_image", slow)
    stage = make_stage(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(stage.add, png())
        started.wait(10)
        second = pool.submit(stage.add, png())
        go_on.set()
        assert first.result(10) == second.result(10)


def test_a_fault_is_remembered_with_the_file_it_came_from(tmp_path):
    stage = make_stage(tmp_path)
    file = write(tmp_path / "page.jpg", b"<html>")
    for _ in range(2):
        with pytest.raises(RowError, match=r"page\.jpg: The bytes are not a picture .*begin with '<html>'"):
            stage.add(file)


def test_a_missing_file_is_rejected(tmp_path):
    assert reason_of(make_stage(tmp_path), tmp_path / "none.jpg") == "missing_image"


@pytest.mark.parametrize("name", ["nul\0.jpg", "n" * 5000, "."])
def test_impossible_names_are_rejected(tmp_path, name):
    assert reason_of(make_stage(tmp_path), tmp_path / "folder" / name) in ("missing_image", "unreadable_file")


def test_a_folder_and_a_pipe_are_no_images(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason_of(make_stage(tmp_path), tmp_path / "folder.jpg") == "unreadable_file"
    assert reason_of(make_stage(tmp_path), tmp_path / "pipe.jpg") == "unreadable_file"


def test_a_file_without_permission_is_rejected(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    file = write(tmp_path / "a.jpg", jpeg())
    monkeypatch.setattr(image_stage.os, "open", refuse)  # root, as in a container, may read everything
    assert reason_of(make_stage(tmp_path), file) == "unreadable_file"


def test_a_file_too_large_for_memory_is_not_read(tmp_path):
    file = tmp_path / "huge.jpg"
    with file.open("wb") as opened:
        opened.truncate(image_stage.MAX_FILE_BYTES + 1)
    assert reason_of(make_stage(tmp_path), file) == "file_too_large"


def test_paths_outside_are_rejected_and_the_message_says_how_to_allow_them(tmp_path):
    project, outside = tmp_path / "project", tmp_path / "outside"
    file = write(outside / "a.jpg", jpeg())
    with pytest.raises(RowError, match=r"add its folder to image\.allowed_roots: \[.*outside\]") as fault:
        make_stage(project).add(file)
    assert fault.value.reason == "outside_allowed_roots"
    assert make_stage(project, allowed_roots=[str(outside)]).add(file)
    assert make_stage(project, outside).add(file)


def test_an_allowed_root_is_no_prefix_of_a_name(tmp_path):
    file = write(tmp_path / "pictures_of_others" / "a.jpg", jpeg())
    stage = make_stage(tmp_path / "project", allowed_roots=[str(tmp_path / "pictures")])
    assert reason_of(stage, file) == "outside_allowed_roots"


@pytest.mark.parametrize("way_out", ["../outside/a.jpg", "link.jpg", "linked_folder/a.jpg"])
def test_neither_dots_nor_links_lead_outside(tmp_path, way_out):
    project, outside = tmp_path / "project", tmp_path / "outside"
    write(outside / "a.jpg", jpeg())
    project.mkdir()
    (project / "link.jpg").symlink_to(outside / "a.jpg")
    (project / "linked_folder").symlink_to(outside)
    assert reason_of(make_stage(project), project / way_out) == "outside_allowed_roots"


def test_a_link_in_a_circle_is_rejected(tmp_path):
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert reason_of(make_stage(tmp_path), tmp_path / "loop.jpg") in ("missing_image", "unreadable_file")


def test_a_half_written_file_of_a_killed_run_is_written_again(tmp_path):
    folders = DataFolders.of(workspace_folder(tmp_path))
    staged = write(folders.stage / (hashlib.sha256(jpeg()).hexdigest() + ".jpg"), jpeg()[:100])
    make_stage(tmp_path).add(jpeg())
    assert staged.read_bytes() == jpeg()


def test_what_the_store_holds_is_not_staged_again_unless_it_was_altered(tmp_path):
    folders = DataFolders.of(workspace_folder(tmp_path))
    stored = write(folders.files / (hashlib.sha256(jpeg()).hexdigest() + ".jpg"), jpeg())
    make_stage(tmp_path).add(jpeg())
    assert not list(folders.stage.iterdir())
    stored.write_bytes(jpeg()[:-1] + b"\0")
    make_stage(tmp_path).add(jpeg())
    assert [file.read_bytes() for file in folders.stage.iterdir()] == [jpeg()]


def test_a_full_disk_stops_the_run_and_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    stage = make_stage(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left on device"):
        stage.add(jpeg())
    assert not list(DataFolders.of(workspace_folder(tmp_path)).stage.iterdir())
