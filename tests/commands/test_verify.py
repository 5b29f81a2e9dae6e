"""`qwen-vl-lora verify` ends with 1 where an artifact or parameter differs, and with 0 where only the machine does."""

import json

import pytest
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.records import runs_folder


@pytest.fixture
def add(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(run_id, text="same", r=4, threads=2):
        path = tmp_path / "data/05/tiny/samples.json" / run_id / "samples.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        written = {"samples": {"version": run_id, "path": path.relative_to(tmp_path).as_posix(), "sha256": text}}
        facts = {"format": 1, "id": run_id, "recipe": "tiny", "outcome": "finished", "threads": threads}
        facts |= {"parameters": {"lora": {"r": r}}, "datasets": {"read": {}, "written": written}}
        folder = runs_folder(tmp_path, "tiny") / run_id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(facts))

    return make


def verify(*arguments):
    result = CliRunner().invoke(cli, ["verify", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


def test_equal_runs_on_other_machines_end_with_0_and_the_machine_is_named(add):
    add("r1")
    add("r2", threads=8)
    code, said = verify("r1", "r2")
    assert code == 0
    assert "artifacts: the same\nparameters: the same\nsurroundings that differ:\n  threads: 2 → 8" in said


def test_the_first_difference_is_named_with_its_line(add):
    add("r1", "a red circle")
    add("r2", "a blue circle", r=8)
    code, said = verify("r1", "r2")
    assert code == 1
    assert "first artifact that differs: samples: r1 and r2 differ: line 1: a red circle → a blue circle" in said
    assert "first parameter that differs: lora.r: 4 → 8" in said


def test_an_unknown_run_is_an_error(add):
    with pytest.raises(MissingArtifactError, match="Run not found: r9"):
        verify("r9")
