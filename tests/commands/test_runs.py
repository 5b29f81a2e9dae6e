"""`qwen-vl-lora runs` lists runs and compares those that are named."""

import json

import pytest
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.records import runs_folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`runs("r1", r=4)`: a recorded run; then `runs.call("runs")`."""
    monkeypatch.chdir(tmp_path)

    class Runs:
        def add(self, run_id, r, cider=None, outcome="finished"):
            folder = runs_folder(tmp_path, "tiny") / run_id
            folder.mkdir(parents=True)
            facts = {
                "format": 1,
                "id": run_id,
                "recipe": "tiny",
                "pipelines": ["training"],
                "outcome": outcome,
                "parameters": {"lora": {"r": r, "bias": "none"}},
                "results": {"caption_metrics": {"tuned": {"CIDEr": cider}}} if cider else {},
                "datasets": {"read": {}, "written": {}},
            }
            (folder / "record.json").write_text(json.dumps(facts))

        def call(self, *arguments):
            return CliRunner().invoke(cli, ["runs", *arguments], catch_exceptions=False).output

    return Runs()


def test_every_run_is_listed_with_its_outcome_metrics_and_what_differs(runs):
    runs.add("r1", r=4, cider=1.25)
    runs.add("r2", r=8, outcome="failed")
    listed = runs.call()
    for text in ("r1", "r2", "finished", "failed", "lora.r", "CIDEr tuned 1.25"):
        assert text in listed
    assert "lora.bias" not in listed


def test_a_run_whose_process_is_gone_is_shown_as_interrupted(runs):
    runs.add("r1", r=4, outcome="running")
    assert "interrupted" in runs.call()


def test_named_runs_stand_side_by_side(runs):
    for number in (1, 2, 3):
        runs.add(f"r{number}", r=number, cider=number / 8)
    compared = runs.call("r1", "r3")
    assert "r2" not in compared
    assert "CIDEr tuned" in compared
    assert "0.375" in compared


def test_an_unknown_run_is_named_with_those_there_are(runs):
    runs.add("r1", r=4)
    with pytest.raises(MissingArtifactError, match="There is no run r9. The newest: r1"):
        runs.call("r9")


def test_a_broken_record_is_left_out_and_named(runs, tmp_path, caplog):
    runs.add("r1", r=4)
    broken = runs_folder(tmp_path, "tiny") / "r2"
    broken.mkdir()
    (broken / "record.json").write_text("{")
    assert "r1" in runs.call()
    assert "is no run record" in caplog.text


def test_without_runs_it_says_how_to_make_one(runs):
    assert "No run is recorded yet" in runs.call()


def test_brackets_in_a_message_are_text_and_subfolders_belong_to_the_project(runs, tmp_path, monkeypatch):
    runs.add("r1", r=4, outcome="failed")
    file = runs_folder(tmp_path, "tiny") / "r1" / "record.json"
    facts = json.loads(file.read_text()) | {"message": "add image.allowed_roots: [/nas/p]"}
    file.write_text(json.dumps(facts))
    (tmp_path / "pyproject.toml").write_text("[tool.kedro]")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert "[/nas/p]" in runs.call("r1")
