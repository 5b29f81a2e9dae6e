"""Files appear whole, reach the disk before they are visible, and locks die with their process."""

import errno
import os
import subprocess
import sys

import pytest

from qwen_vl_lora.runs import storage
from qwen_vl_lora.runs.storage import Lock, discard, leftovers, move, replace, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "record.json"
    write_whole(file, "old")
    write_whole(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    write_whole(file, "old")

    def fail(path):
        raise OSError("no room")

    monkeypatch.setattr(storage, "sync_file", fail)
    with pytest.raises(OSError, match="no room"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, to: (events.append("rename"), rename(self, to)))
    write_whole(tmp_path / "a", "text")
    assert events == ["sync", "rename", "sync"]


def test_many_files_are_synced_at_once_or_one_by_one(tmp_path, monkeypatch):
    (tmp_path / "a").touch()
    synced = []
    monkeypatch.setattr(storage, "sync_tree", synced.append)
    storage.sync_files(tmp_path)
    monkeypatch.setattr(storage.ctypes, "CDLL", lambda name: object())  # a system without syncfs
    storage.sync_files(tmp_path)
    assert synced[-1] == tmp_path


def test_a_new_folder_survives_power_loss_with_what_is_saved_in_it(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "sync_folder", synced.append)
    storage.make_folder(tmp_path / "06_models" / "tiny")
    assert synced == [tmp_path, tmp_path / "06_models"]
    storage.make_folder(tmp_path / "06_models" / "tiny")
    assert len(synced) == 2


def test_a_folder_is_replaced_and_discarded_whole(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace(tmp_path / "two", tmp_path / "one")
    assert os.listdir(tmp_path / "one") == ["two"]
    discard(tmp_path / "one")
    discard(tmp_path / "one")
    assert os.listdir(tmp_path) == []


def test_leftovers_are_hidden_partial_and_retired_entries(tmp_path):
    for name in (".a.1.partial", ".b.2.retired", ".lock", "c.partial", "checkpoint-3"):
        (tmp_path / name).mkdir()
    assert [path.name for path in leftovers(tmp_path)] == [".a.1.partial", ".b.2.retired"]


def test_a_lock_is_held_once_and_freed_by_a_kill(tmp_path):
    path = tmp_path / "job" / ".lock"
    script = (
        "import signal, sys; from pathlib import Path; from qwen_vl_lora.runs.storage import Lock\n"
        "lock = Lock(Path(sys.argv[1])); assert lock.acquire(); print('held', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert Lock.is_held(path)
        assert not Lock(path).acquire()
        holder.kill()
    assert not Lock.is_held(path)
    lock = Lock(path)
    assert lock.acquire()
    lock.release()
    assert not Lock.is_held(path)


@pytest.fixture
def two_disks(tmp_path, monkeypatch):
    """Two folders between which nothing can be renamed, as if each lay on a disk of its own."""
    rename = type(tmp_path).replace

    def refuse(self, target):
        if self.relative_to(tmp_path).parts[0] != target.relative_to(tmp_path).parts[0]:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "replace", refuse)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "other"


def test_a_file_and_a_folder_move_to_another_disk_and_leave_nothing_behind(two_disks):
    one, other = two_disks
    (one / "file").write_text("new")
    (one / "folder").mkdir()
    (one / "folder" / "file").write_text("text")
    (other / "file").write_text("old")
    for name in ("file", "folder"):
        move(one / name, other / name)
    assert (other / "file").read_text() == "new"
    assert (other / "folder" / "file").read_text() == "text"
    assert not os.listdir(one)
    assert sorted(os.listdir(other)) == ["file", "folder"]


def test_half_a_file_is_never_seen_under_its_name_on_another_disk(two_disks, monkeypatch):
    one, other = two_disks
    (one / "file").write_text("new")

    def stop(source, target):
        target.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.shutil, "move", stop)
    with pytest.raises(OSError, match="No space left"):
        move(one / "file", other / "file")
    assert leftovers(other) == list(other.iterdir())
    assert (one / "file").read_text() == "new"
