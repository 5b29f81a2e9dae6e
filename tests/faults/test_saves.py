"""A kill during a save leaves the old version readable, and the new one whole or invisible, for every dataset type."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faults.saves import FEATURES, MOMENTS, PROJECT, content, entries_of_each_type, open_entry

KILLED = -9


@pytest.fixture(scope="module")
def save():
    """`save(folder, entry, version, "new", moment)`: in a process of its own, which dies at `moment`."""
    program = [sys.executable, str(Path(__file__).with_name("saver.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(program, env={"PYTHONPATH": str(PROJECT / "tests")}, **pipes) as saver:

        def order(folder, entry, version, which, moment=None):
            given = {"folder": str(folder), "entry": entry, "version": version, "which": which, "moment": moment}
            saver.stdin.write(json.dumps(given) + "\n")
            saver.stdin.flush()
            return int(saver.stdout.readline())

        yield order
        saver.stdin.close()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("entry", [name for name in entries_of_each_type() if name != FEATURES])
def test_a_killed_save_leaves_a_whole_version(tmp_path, save, entry, moment):
    assert save(tmp_path, entry, "v1", "old") == 0
    old = content(open_entry(tmp_path, entry).existing_path())
    assert save(tmp_path, entry, "v2", "new", moment) == KILLED
    dataset = open_entry(tmp_path, entry)
    left = content(dataset.existing_path())
    dataset.load()
    assert (left == old) is (moment != "renamed")
    assert save(tmp_path, entry, "v3", "new") == 0
    whole = content(open_entry(tmp_path, entry).existing_path())
    assert whole != old
    assert left in (old, whole)


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_a_killed_publishing_of_features_leaves_whole_shards(tmp_path, save, moment):
    assert save(tmp_path, FEATURES, None, "old") == 0
    root = open_entry(tmp_path, FEATURES).load().root
    old = content(root)
    assert save(tmp_path, FEATURES, None, "new", moment) == KILLED
    left = content(root)
    assert left.items() >= old.items()
    assert save(tmp_path, FEATURES, None, "new") == 0
    assert content(root).items() >= left.items()
    assert len(content(root)) == len(old) + 2
