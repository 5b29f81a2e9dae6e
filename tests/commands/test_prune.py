"""`qwen-vl-lora prune` removes nothing before `--yes`, and nothing while a run is under way."""

import json

import pytest
from click.testing import CliRunner

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.records import runs_folder
from qwen_vl_lora.lineage.storage import Lock


@pytest.fixture
def old_version(tmp_path, monkeypatch):
    """A version that a newer run made needless."""
    monkeypatch.chdir(tmp_path)
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
    with pytest.raises(MissingArtifactError, match="There is no run r9. The newest: r1, r2"):
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
    assert "run r2 is under way; nothing is removed" in prune("--yes")
    assert old_version.exists()
    lock.release()
