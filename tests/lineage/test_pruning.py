"""A prune removes what nothing kept needs, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from qwen_vl_lora.lineage.pruning import plan_removals, version_folder
from qwen_vl_lora.lineage.records import runs_folder
from qwen_vl_lora.lineage.storage import Lock

DATA = ["train_conversations", "test_conversations"]


@pytest.fixture
def history(tmp_path):
    """`history("d1", wrote=[…], read={…})`: a run with its artifacts on disk."""
    sequence = iter(range(1, 100))

    def make(run_id, wrote, read=None, stage="data_engineering"):
        written = {}
        for name in wrote:
            path = tmp_path / "data" / "05_model_input" / "tiny" / name / run_id / name
            path.mkdir(parents=True)
            if name == "adapter":
                named = {other: {"version": version} for other, version in (read or {}).items()}
                (path / "adapter_record.json").write_text(json.dumps({"run": {"read": named}}))
            written[name] = {"version": run_id, "path": path.relative_to(tmp_path).as_posix()}
        facts = {
            "format": 1,
            "id": run_id,
            "sequence": next(sequence),
            "outcome": "finished",
            "recipe": "tiny",
            "stages": {stage: wrote},
            "datasets": {
                "read": {name: {"version": version, "path": "x"} for name, version in (read or {}).items()},
                "written": written,
            },
        }
        folder = runs_folder(tmp_path, "tiny") / run_id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(facts))

    return make


def removed(project, keep=1, keep_runs=()):
    return {
        str(removal.path.relative_to(project / "data")) for removal in plan_removals(project, "tiny", keep, keep_runs)
    }


def test_versions_that_only_dropped_adapters_used_go(tmp_path, history):
    for number in (1, 2):
        history(f"d{number}", DATA)
        history(f"t{number}", ["adapter"], {"train_conversations": f"d{number}"}, "training")
    assert removed(tmp_path) == {
        "05_model_input/tiny/train_conversations/d1",
        "05_model_input/tiny/test_conversations/d1",
        "05_model_input/tiny/adapter/t1",
    }
    assert removed(tmp_path, keep=2) == set()
    assert removed(tmp_path, keep_runs=["t1"]) == set()


def test_what_a_kept_adapters_own_record_names_stays_though_its_run_record_is_gone_from_view(tmp_path, history):
    history("d1", DATA)
    history("d2", DATA)
    history("t3", ["adapter"], {"train_conversations": "d1"}, "training")
    record = runs_folder(tmp_path, "tiny") / "t3" / "record.json"
    facts = json.loads(record.read_text())
    facts["datasets"]["read"] = {}
    record.write_text(json.dumps(facts))
    assert removed(tmp_path) == {"05_model_input/tiny/test_conversations/d1"}


def test_the_newest_complete_data_stay_though_no_adapter_uses_them(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training")
    history("d2", DATA)
    history("d3", DATA)
    assert removed(tmp_path) == {
        "05_model_input/tiny/train_conversations/d2",
        "05_model_input/tiny/test_conversations/d2",
    }


def test_what_was_measured_with_a_kept_adapter_stays(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training")
    history("e1", ["predictions"], {"adapter": "t1", "test_conversations": "d1"}, "evaluation")
    history("e2", ["predictions"], {"adapter": "t1", "test_conversations": "d1"}, "evaluation")
    assert removed(tmp_path) == set()


def test_versions_that_no_record_knows_are_left_alone(tmp_path, history):
    history("d1", DATA)
    unknown = tmp_path / "data/05_model_input/tiny/train_conversations/d0/train_conversations"
    unknown.mkdir(parents=True)
    assert removed(tmp_path) == set()


@pytest.mark.parametrize(
    "path",
    [
        "src/a/tiny/x/v1/x",
        "../data/05/tiny/x/v1/x",
        "data/05/tiny/../../conf/v1/conf",
        "data/05/other/x/v1/x",
        "data/05/tiny/x/v2/x",
        "/etc/data/tiny/x/v1/x",
        "data/05/tiny/link/v1/link",
    ],
)
def test_a_record_that_leads_elsewhere_is_not_followed(tmp_path, path):
    (tmp_path / path.lstrip("/")).mkdir(parents=True, exist_ok=True) if "link" not in path else None
    elsewhere = tmp_path / "elsewhere" / "v1" / "link"
    elsewhere.mkdir(parents=True)
    (tmp_path / "data/05/tiny").mkdir(parents=True, exist_ok=True)
    (tmp_path / "data/05/tiny/link").symlink_to(elsewhere.parents[1])
    assert version_folder(tmp_path, "tiny", {"version": "v1", "path": path}) is None


def test_checkpoints_go_but_for_the_newest_unfinished_and_those_in_use(tmp_path, history):
    history("d1", DATA)
    training = tmp_path / "data/09_workspace/tiny/training"
    for number, name in enumerate(("ended", "given_up", "in_use", "unfinished")):
        (training / name / ("x" if name == "ended" else "checkpoint-3")).mkdir(parents=True)
        (training / name / "inputs.json").write_text("{}")
        os.utime(training / name / "inputs.json", (number, number))
    lock = Lock(training / "in_use" / ".lock")
    assert lock.acquire()
    assert removed(tmp_path) == {"09_workspace/tiny/training/ended", "09_workspace/tiny/training/given_up"}
    lock.release()


def test_features_of_keys_that_no_kept_run_used_go(tmp_path, history):
    history("d1", DATA)
    folder = tmp_path / "data/04_feature/tiny/image_features/0123"
    folder.mkdir(parents=True)
    (folder / "key.json").write_text("{}")
    assert removed(tmp_path) == {"04_feature/tiny/image_features/0123"}


def test_what_killed_saves_left_goes(tmp_path, history):
    history("d1", DATA)
    (tmp_path / "data/05_model_input/tiny/.train_conversations.0.partial").mkdir()
    (tmp_path / "data/05_model_input/tiny/train_conversations/.d0.1.retired").mkdir()
    assert removed(tmp_path) == {
        "05_model_input/tiny/.train_conversations.0.partial",
        "05_model_input/tiny/train_conversations/.d0.1.retired",
    }


def test_pictures_that_no_manifest_names_go(tmp_path, history):
    history("d1", DATA)
    root = tmp_path / "data/02_intermediate/tiny/images"
    (root / "files").mkdir(parents=True)
    for name in ("aa.png", "bb.png"):
        (root / "files" / name).touch()
    manifest = root / "manifest.csv" / "d1" / "manifest.csv"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(f"id,sha256,path,width\n1,aa,{Path('data/02_intermediate/tiny/images/files/aa.png')},3\n")
    assert removed(tmp_path) == {"02_intermediate/tiny/images/files/bb.png"}
