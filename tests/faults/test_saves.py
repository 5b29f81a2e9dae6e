"""A kill during a save leaves the old version readable, and the new one whole or invisible, for every dataset type."""

import json
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

import pytest
from kedro.io import DatasetError

from faults.saves import (
    FEATURES,
    MOMENTS,
    PROJECT,
    catalog_config,
    content,
    entries_of_each_type,
    is_read_only,
    open_entry,
)
from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset

CATALOG = catalog_config()
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


def test_the_entries_are_those_of_every_recipe():
    assert {"captioned_images", "own_captions__captioned_images", "adapter", "train_conversations"} <= CATALOG.keys()
    assert len(entries_of_each_type()) >= 9


@pytest.mark.parametrize("entry", [name for name in CATALOG if is_read_only(name)])
def test_what_no_kill_test_covers_cannot_be_saved(tmp_path, entry):
    with pytest.raises(DatasetError, match="read.only|input only"):
        open_entry(tmp_path, entry).save(object())


@pytest.mark.parametrize("entry", [name for name in CATALOG if not is_read_only(name) and name != FEATURES])
def test_every_entry_that_is_saved_appears_by_one_rename(tmp_path, entry):
    """The kill tests below take the first entry of each type; this holds for the others of the type."""
    dataset = open_entry(tmp_path, entry, "v1" if CATALOG[entry].get("versioned") else None)
    assert isinstance(dataset, AtomicVersionedDataset)
    assert unwrap(type(dataset).save) is unwrap(AtomicVersionedDataset.save)  # Kedro wraps it in every class
    assert type(dataset).resolve_load_version is AtomicVersionedDataset.resolve_load_version


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
