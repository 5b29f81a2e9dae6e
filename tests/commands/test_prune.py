"""`qwen-vl-lora prune` removes nothing before `--yes`, and nothing while a run is under way."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.records import runs_folder
from qwen_vl_lora.runs.storage import Lock

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def old_version(tmp_path, monkeypatch):
    """A version that a newer run made needless."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    for number, run_id in enumerate(("r1", "r2")):
        path = tmp_path / "data/05_model_input/tiny/samples.json" / run_id / "samples.json"
        path.parent.mkdir(parents=True)
        path.write_text("[]")
        folder = runs_folder(tmp_path, "tiny") / run_id
        folder.mkdir(parents=True)
        facts = {
            "format": 1,
            "id": run_id,
            "sequence": number,
            "recipe": "tiny",
            "outcome": "finished",
            "stages": {"data_engineering": ["samples"]},
            "datasets": {
                "read": {},
                "written": {"samples": {"version": run_id, "path": path.relative_to(tmp_path).as_posix()}},
            },
        }
        (folder / "record.json").write_text(json.dumps(facts))
    return tmp_path / "data/05_model_input/tiny/samples.json/r1"


def prune(*arguments):
    return CliRunner().invoke(cli, ["prune", *arguments], catch_exceptions=False).output


def test_it_shows_first_and_removes_when_told(old_version):
    assert "would remove data/05_model_input/tiny/samples.json/r1: samples r1" in prune()
    assert old_version.exists()
    assert "removed data/05_model_input/tiny/samples.json/r1" in prune("--yes")
    assert not old_version.exists()
    assert (old_version.parent / "r2").exists()


def test_a_named_run_keeps_its_versions(old_version):
    assert "0 removals" in prune("--yes", "--keep-run", "r1")
    assert old_version.exists()


def test_a_run_to_keep_that_does_not_exist_is_an_error_and_nothing_goes(old_version):
    with pytest.raises(MissingArtifactError, match="Run not found: r9. Newest runs: r1 .finished., r2 .finished."):
        prune("--yes", "--keep-run", "r9")
    assert old_version.exists()


def test_a_recipe_without_records_is_an_error_and_nothing_goes(old_version, tmp_path):
    features = tmp_path / "data/04_feature/other/image_features/0123"
    features.mkdir(parents=True)
    (features / "key.json").write_text("{}")
    with pytest.raises(MissingArtifactError, match="No run of recipe 'other' is recorded.*Recipes with runs: tiny"):
        prune("--yes", "--recipe", "other")
    assert features.exists()


def test_nothing_goes_while_a_run_is_under_way(old_version, tmp_path):
    folder = runs_folder(tmp_path, "tiny") / "r2"
    record = folder / "record.json"
    record.write_text(record.read_text().replace("finished", "running"))
    lock = Lock(folder / ".lock")
    assert lock.acquire()
    assert "run r2 is still running; nothing is removed" in prune("--yes")
    assert old_version.exists()
    lock.release()


def test_it_looks_where_the_catalog_of_the_newest_runs_environment_keeps_things(old_version, tmp_path):
    record = runs_folder(tmp_path, "tiny") / "r2" / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "env": "mine"}))
    (tmp_path / "conf/mine").mkdir()
    entry = {"type": "qwen_vl_lora.datasets.workspace.WorkspaceDataset", "filepath": "work/${runtime_params:recipe}"}
    (tmp_path / "conf/mine/catalog.yml").write_text(json.dumps({"workspace": entry}))  # JSON is YAML
    (tmp_path / "work/tiny/export/merged_model").mkdir(parents=True)
    assert "removed work/tiny/export/merged_model: left by an export that was ended" in prune("--yes")
