"""`qwen-vl-lora runs` lists runs and compares those that are named."""

import datetime as dt
import json

import pytest
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.records import runs_folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`runs("r1", r=4)`: a recorded run; then `runs.call("runs")`."""
    monkeypatch.chdir(tmp_path)

    class Runs:
        def add(self, run_id, r, cider=None, outcome="finished", recipe="tiny", **more):
            folder = runs_folder(tmp_path, recipe) / run_id
            folder.mkdir(parents=True)
            facts = {
                "format": 1,
                "id": run_id,
                "recipe": recipe,
                "pipelines": ["training"],
                "outcome": outcome,
                "parameters": {"lora": {"r": r, "bias": "none"}},
                "results": {"caption_metrics": {"tuned": {"CIDEr": cider}}} if cider else {},
                "datasets": {"read": {}, "written": {}},
                **more,
            }
            (folder / "record.json").write_text(json.dumps(facts))

        def call(self, *arguments):
            return CliRunner().invoke(cli, ["runs", *arguments], catch_exceptions=False).output

    return Runs()


def test_every_run_is_one_line_in_the_order_of_time_with_what_changed(runs):
    started = (dt.datetime.now(dt.UTC) - dt.timedelta(hours=2, minutes=30)).isoformat()
    runs.add("2026-11-25T03.52.45.972Z", r=4, cider=1.25, order=1, started=started)
    runs.add("2026-11-25T04.10.00.000Z", r=4, order=2, recipe="own_captions", outcome="failed")
    runs.add("2026-11-25T05.00.00.000Z", r=8, order=3)
    heading, *lines = runs.call().splitlines()
    assert heading.split() == ["run", "age", "recipe", "pipelines", "outcome", "CIDEr", "changed"]
    assert lines[0].split() == ["2026-11-25T03.52.45.972Z", "2", "h", "tiny", "training", "finished", "1.25"]
    assert lines[1].split() == ["2026-11-25T04.10.00.000Z", "–", "own_captions", "training", "failed", "–"]
    assert lines[2].split()[-3:] == ["finished", "–", "lora.r=8"]


def test_many_changes_are_counted(runs):
    runs.add("r1", r=4)
    changed = {"a": 1, "b": [2], "c": "text", "d": True, "e": 0.5}
    runs.add("r2", r=4, parameters=changed | {"lora": {"r": 4, "bias": "none"}})
    assert runs.call().splitlines()[-1].endswith('a=1, b=[2], c="text", and 2 more')


def test_a_list_for_programs_has_everything(runs):
    runs.add("r1", r=4, cider=1.25)
    runs.add("r2", r=8, outcome="failed", message="no memory")
    first, second = json.loads(runs.call("--json"))
    assert (first["id"], first["metrics"], first["changed"]) == ("r1", {"CIDEr tuned": 1.25}, {})
    assert (second["outcome"], second["message"], second["changed"]) == ("failed", "no memory", {"lora.r": 8})
    assert [one["id"] for one in json.loads(runs.call("r2", "--json"))] == ["r2"]


def test_an_unknown_recipe_is_named_with_those_that_have_runs(runs):
    runs.add("r1", r=4)
    runs.add("r2", r=4, recipe="own_captions")
    with pytest.raises(MissingArtifactError, match="recipe 'own_caption' .*nearest: own_captions.* own_captions, tiny"):
        runs.call("--recipe", "own_caption")


def test_a_long_text_is_wrapped_and_never_cut(runs):
    words = "一滴水落在平静的湖面上" * 9
    runs.add("r1", r=4, message=words)
    assert "…" not in runs.call("r1")


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
    with pytest.raises(MissingArtifactError, match=r"Run not found: r9. Newest runs: r1 \(finished\)"):
        runs.call("r9")


def test_a_broken_record_is_left_out_and_named(runs, tmp_path, caplog):
    runs.add("r1", r=4)
    broken = runs_folder(tmp_path, "tiny") / "r2"
    broken.mkdir()
    (broken / "record.json").write_text("{")
    assert "r1" in runs.call()
    assert "is not a run record" in caplog.text


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
