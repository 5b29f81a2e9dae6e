"""A run's folder is whole or absent, and the order of runs is their sequence."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs import records, storage
from qwen_vl_lora.runs.records import (
    RecordWriter,
    all_records,
    find_record,
    read_record,
    read_records,
    runs_folder,
    sorted_by_making,
)
from qwen_vl_lora.runs.run import Run, RunInterruptedError

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
    with pytest.raises(RunInterruptedError, match="r1 already exists: another run began in the same millisecond"):
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
    with pytest.raises(MissingArtifactError, match="Run not found: latest. Newest runs: none"):
        find_record(tmp_path, "latest")


def test_the_latest_run_of_several_recipes_is_the_last_that_began_though_the_clock_went_back(tmp_path):
    for run_id, recipe in (("2026-05", "one"), ("2026-01", "two"), ("2026-03", "one")):
        run = Run(run_id)
        run.facts["recipe"] = recipe
        writer = RecordWriter(runs_folder(tmp_path, recipe) / run_id, run)
        writer.open(CONFIGURATION)
        writer.close("finished")
    assert find_record(tmp_path, "latest").id == "2026-03"
    assert [record.id for record in all_records(tmp_path)] == ["2026-05", "2026-01", "2026-03"]
    assert [record.id for record in read_records(runs_folder(tmp_path, "one"))] == ["2026-05", "2026-03"]


def test_records_of_earlier_versions_stand_before_those_with_an_order(tmp_path, record):
    record("2026-09", ["samples"])
    record("2026-02", ["samples"], recipe="other")
    record("2026-05", ["samples"])  # the clock went back
    record("2026-01", ["samples"], order=1)
    assert [record.id for record in all_records(tmp_path)] == ["2026-02", "2026-09", "2026-05", "2026-01"]


@given(st.permutations(["2026-01", "2026-02", "2026-03", "2026-04"]))
def test_versions_sort_by_the_order_in_which_their_runs_began(names):
    with tempfile.TemporaryDirectory() as folder:
        for sequence, name in enumerate(names):
            (Path(folder) / name).mkdir()
            facts = {"format": 1, "id": name, "recipe": "tiny", "outcome": "finished", "sequence": sequence}
            facts["datasets"] = {"read": {}, "written": {}}
            (Path(folder) / name / "record.json").write_text(json.dumps(facts))
        assert sorted_by_making(sorted(names), [Path(folder)]) == names[::-1]
        newest = sorted_by_making([*names, "2026-09"], [Path(folder)])  # saved in a notebook, say
        assert newest == ["2026-09", *names[::-1]]


def facts_with(**changes):
    facts = {
        "format": 1,
        "id": "r1",
        "recipe": "tiny",
        "outcome": "finished",
        "datasets": {"read": {}, "written": {"samples": {"version": "r1", "path": "x"}}},
    }
    return {**facts, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "../../x"},
        {"recipe": "../../OUTSIDE"},
        {"env": "../data/08_reporting/tiny/runs/r1/conf/base"},
        {"env": "/etc"},
        {"pipelines": ["a/b"]},
        {"pipelines": "training"},
        {"outcome": "fine"},
        {"format": 2},
        {"sequence": "1"},
        {"sequence": -1},
        {"order": 1.5},
        {"datasets": []},
        {"datasets": {"read": {}, "written": {"samples": {"version": "../x", "path": "x"}}}},
        {"datasets": {"read": {}, "written": {"samples": {"version": "r1", "path": 3}}}},
        {"datasets": {"read": {"image_features": {"keys": ["../x"]}}, "written": {}}},
        {"datasets": {"read": {"images": "text"}, "written": {}}},
        {"free_inputs": {"images": "a/b"}},
        {"stages": {"run": "images"}},
        {"parameters": []},
        {"results": {"caption_metrics": 3}},
        {"message": {"a": 1}},
        {"configuration": "a\0b"},
    ],
)
def test_a_record_of_another_form_is_refused_by_the_key_and_left_out_of_lists(tmp_path, caplog, changes):
    folder = tmp_path / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(facts_with()))
    assert read_record(folder).id == "r1"
    (folder / "record.json").write_text(json.dumps(facts_with(**changes)))
    with pytest.raises(DataFormatError, match=rf"record\.json is not a run record: {next(iter(changes))}"):
        read_record(folder)
    assert read_records(tmp_path / "runs") == []
    assert "Skipped." in caplog.text


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"format": NaN}', b'{"id": ' + b"1" * 5000]
)
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "record.json").write_bytes(text)
    with pytest.raises(DataFormatError, match=r"record\.json is not a run record: "):
        read_record(tmp_path)


def test_a_pipe_and_a_folder_in_place_of_a_record_are_no_records(tmp_path):
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "record.json")
        with pytest.raises(MissingArtifactError, match="Run record not found"):
            read_record(tmp_path / name)
    assert read_records(tmp_path) == []


def test_a_record_in_the_making_is_none_of_the_runs(tmp_path):
    folder = tmp_path / f".r1.{'0' * 32}.partial"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(facts_with()))
    assert read_records(tmp_path) == []


def test_latest_is_the_newest_run_that_serves_the_purpose(tmp_path):
    for number, outcome in enumerate(("finished", "finished", "failed"), start=1):
        folder = runs_folder(tmp_path, "tiny") / f"r{number}"
        folder.mkdir(parents=True)
        facts = {"format": 1, "id": f"r{number}", "recipe": "tiny", "outcome": outcome, "order": number}
        (folder / "record.json").write_text(json.dumps(facts | {"datasets": {"read": {}, "written": {}}}))
    assert find_record(tmp_path, "latest").id == "r3"
    assert find_record(tmp_path, "latest", lambda record: record.outcome == "finished").id == "r2"
    with pytest.raises(MissingArtifactError, match=r"Run not found: latest. Newest runs: r1 \(finished\), "):
        find_record(tmp_path, "latest", lambda record: record.id == "r9")
