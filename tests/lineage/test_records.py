"""A run's folder is whole or absent, and the order of runs is their sequence."""

import errno
import os

import pytest

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage import records, storage
from qwen_vl_lora.lineage.records import RecordWriter, find_record, read_records
from qwen_vl_lora.lineage.run import Run, RunInterruptedError

CONFIGURATION = {"conf/base/parameters.yml": "seed: 1\n", "replay.yml": "run: {}\n"}


@pytest.fixture
def writer(tmp_path):
    """`writer("r1")`: the writer of a run that has not begun."""

    def make(run_id):
        run = Run(run_id)
        run.facts["recipe"] = "tiny"
        return RecordWriter(tmp_path / "runs" / run_id, run)

    return make


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, writer, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "sync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        writer("r1").open(CONFIGURATION)
    assert os.listdir(tmp_path / "runs") == []


def test_a_run_id_that_is_taken_is_refused_and_the_other_record_stays(tmp_path, writer):
    first = writer("r1")
    first.open(CONFIGURATION)
    first.close("finished")
    with pytest.raises(RunInterruptedError, match="r1 is there already: another one began in the same millisecond"):
        writer("r1").open(CONFIGURATION)
    assert os.listdir(tmp_path / "runs") == ["r1"]
    (record,) = read_records(tmp_path / "runs")
    assert record.outcome == "finished"


def test_every_version_of_a_record_is_on_the_disk_before_it_is_visible(tmp_path, writer, monkeypatch):
    events = []
    sync_file, rename = storage.sync_file, type(tmp_path).replace
    monkeypatch.setattr(storage, "sync_file", lambda path: (events.append("disk"), sync_file(path)))
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, to: (events.append("name"), rename(self, to))[1])
    run = writer("r1")
    run.open(CONFIGURATION)
    assert events == ["disk"] * (len(CONFIGURATION) + 2)  # the record and the lock are the other two
    events.clear()
    run.update()
    run.close("finished")
    assert events == ["disk", "name"] * 2


def test_the_latest_run_is_the_last_that_began_though_the_clock_went_back(tmp_path, record):
    record("2026-05", ["samples"])
    record("2026-01", ["samples"])
    assert find_record(tmp_path, "latest").id == "2026-01"


def test_without_runs_there_is_no_latest(tmp_path):
    with pytest.raises(MissingArtifactError, match="There is no run latest. The newest: none"):
        find_record(tmp_path, "latest")
