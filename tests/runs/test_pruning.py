"""A prune removes what nothing kept needs, and nothing else."""

import json
import os

import pytest

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.runs.pruning import plan_removals, recipes, version_folder
from qwen_vl_lora.runs.records import runs_folder
from qwen_vl_lora.runs.storage import Lock

DATA = ["train_conversations", "test_conversations"]


@pytest.fixture
def history(tmp_path):
    """`history("d1", wrote=[…], read={…})`: a run with its artifacts on disk."""
    sequence = iter(range(1, 100))

    def place(name, version, recipe):
        return f"data/05_model_input/{recipe}/{name}/{version}/{name}"

    def make(
        run_id,
        wrote,
        read=None,
        stage="data_engineering",
        recipe="tiny",
        reads_of=None,
        base=None,
        key=None,
        parent=None,
    ):
        named = {
            name: {"version": version, "path": place(name, version, reads_of or recipe)}
            for name, version in (read or {}).items()
        }
        if key is not None:
            named["image_features"] = {"version": None, "path": "x", "keys": [key]}
        written = {}
        for name in wrote:
            path = tmp_path / place(name, run_id, recipe)
            path.mkdir(parents=True)
            if name == "adapter":
                text = {"base_model": {"name": base or "owner/hub@1"}, "run": {"read": named}}
                text["parent"] = {"path": place("adapter", parent, recipe)} if parent else None
                (path / "adapter_record.json").write_text(json.dumps(text))
            written[name] = {"version": run_id, "path": place(name, run_id, recipe), "sha256": f"{name} of {run_id}"}
        facts = {
            "format": 1,
            "id": run_id,
            "sequence": next(sequence),
            "outcome": "finished",
            "recipe": recipe,
            "stages": {stage: wrote},
            "datasets": {"read": named, "written": written},
        }
        folder = runs_folder(tmp_path, recipe) / run_id
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(facts))

    return make


def places(data, recipe):
    return {
        "images": data / "02_intermediate" / recipe / "images/manifest.csv",
        "image_features": data / "04_feature" / recipe / "image_features",
        "adapter": data / "06_models" / recipe / "adapter",
        "workspace": data / "09_workspace" / recipe,
    }


def removed(project, keep=1, keep_runs=(), moved=None):
    data = project / "data"
    catalogs = {name: {**places(data, name), **(moved or {})} for name in recipes(project)}
    return {
        os.path.relpath(removal.path, data) for removal in plan_removals(project, "tiny", catalogs, keep, keep_runs)
    }


def test_the_parent_of_a_kept_adapter_stays(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training")
    history("t2", ["adapter"], {"train_conversations": "d1"}, "training", parent="t1")
    assert "05_model_input/tiny/adapter/t1" not in removed(tmp_path)
    history("t3", ["adapter"], {"train_conversations": "d1"}, "training")
    assert "05_model_input/tiny/adapter/t1" in removed(tmp_path)


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


def forget(project, run_id):
    """As when the record was lost: an adapter that came from elsewhere has none either."""
    (runs_folder(project, "tiny") / run_id / "record.json").unlink()


def test_an_adapter_whose_run_record_is_lost_keeps_what_its_own_record_names(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training", key="0123")
    history("d2", DATA)
    history("t2", ["adapter"], {"train_conversations": "d2"}, "training", key="4567")
    for key in ("0123", "4567", "89ab"):
        add_features(tmp_path, key)
    assert removed(tmp_path) >= {"05_model_input/tiny/adapter/t1", "04_feature/tiny/image_features/0123"}
    forget(tmp_path, "t1")
    assert removed(tmp_path) == {
        "05_model_input/tiny/test_conversations/d1",
        "04_feature/tiny/image_features/89ab",
    }


def test_what_an_adapter_of_another_recipe_was_trained_on_stays(tmp_path, history):
    history("d1", DATA)
    history("d2", DATA)
    history("t3", ["adapter"], {"train_conversations": "d1"}, "training", recipe="other", reads_of="tiny")
    assert removed(tmp_path) == {"05_model_input/tiny/test_conversations/d1"}


def test_a_merged_model_that_is_the_base_of_an_adapter_stays(tmp_path, history):
    history("m1", ["merged_model"], stage="export")
    history("m2", ["merged_model"], stage="export")
    history("m3", ["merged_model"], stage="export")
    base = "data/05_model_input/tiny/merged_model/m1/merged_model"
    history("t4", ["adapter"], stage="training", recipe="other", base=base)
    assert removed(tmp_path) == {"05_model_input/tiny/merged_model/m2"}


def test_captions_and_merged_models_of_kept_adapters_stay_and_those_of_dropped_ones_go(tmp_path, history):
    for number in (1, 2):
        history(f"t{number}", ["adapter"], stage="training")
        for pipeline, output in (("inference", "captions"), ("export", "merged_model")):
            for run in "ab":
                history(f"{output}{number}{run}", [output], {"adapter": f"t{number}"}, pipeline)
    assert removed(tmp_path) == {
        "05_model_input/tiny/adapter/t1",
        *(f"05_model_input/tiny/{output}/{output}1{run}" for output in ("captions", "merged_model") for run in "ab"),
    }
    assert removed(tmp_path, keep=2) == set()


def test_what_a_run_of_another_recipe_is_reading_stays(tmp_path, history):
    history("d1", DATA)
    history("d2", DATA)
    history("r3", [], {"train_conversations": "d1"}, recipe="other", reads_of="tiny")
    record = runs_folder(tmp_path, "other") / "r3" / "record.json"
    record.write_text(record.read_text().replace("finished", "running"))
    lock = Lock(record.parent / ".lock")
    assert lock.acquire()
    assert removed(tmp_path) == {"05_model_input/tiny/test_conversations/d1"}
    lock.release()
    assert len(removed(tmp_path)) == 2


def test_an_adapter_record_that_cannot_be_read_stops_the_prune(tmp_path, history):
    history("t1", ["adapter"], stage="training")
    (tmp_path / "data/05_model_input/tiny/adapter/t1/adapter/adapter_record.json").write_text("{")
    with pytest.raises(DataFormatError, match="what its adapter needs is unknown and nothing is removed"):
        removed(tmp_path)


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


def test_kept_captions_go_when_no_kept_run_used_them(tmp_path, history):
    history("d1", DATA)
    for number in (1, 2):
        history(f"t{number}", ["adapter"], {"train_conversations": "d1"}, "training")
        record = runs_folder(tmp_path, "tiny") / f"t{number}" / "record.json"
        captions = {"base": {"key": "shared", "taken": 0}, "tuned": {"key": f"k{number}", "taken": 0}}
        record.write_text(json.dumps({**json.loads(record.read_text()), "captions": captions}))
    kept = tmp_path / "data/09_workspace/tiny/evaluation"
    kept.mkdir(parents=True)
    for key in ("shared", "k1", "k2"):
        (kept / f"{key}.jsonl").write_text("{}\n")
    gone = removed(tmp_path)
    assert {place for place in gone if "evaluation" in place} == {"09_workspace/tiny/evaluation/k1.jsonl"}


def add_features(project, key):
    folder = project / "data/04_feature/tiny/image_features" / key
    folder.mkdir(parents=True)
    (folder / "key.json").write_text("{}")


def test_features_of_keys_that_no_kept_run_used_go(tmp_path, history):
    history("t1", ["adapter"], stage="training", key="0123")
    history("t2", ["adapter"], stage="training", key="4567")
    for key in ("0123", "4567"):
        add_features(tmp_path, key)
    assert removed(tmp_path) == {"05_model_input/tiny/adapter/t1", "04_feature/tiny/image_features/0123"}


def test_what_killed_saves_left_goes(tmp_path, history):
    history("d1", DATA)
    (tmp_path / "data/05_model_input/tiny/.train_conversations.0.partial").mkdir()
    (tmp_path / "data/05_model_input/tiny/train_conversations/.d0.1.retired").mkdir()
    assert removed(tmp_path) == {
        "05_model_input/tiny/.train_conversations.0.partial",
        "05_model_input/tiny/train_conversations/.d0.1.retired",
    }


def test_what_was_killed_beside_the_recipes_and_in_the_workspace_goes(tmp_path, history):
    history("d1", DATA)
    left = [
        f"06_models/.tiny_qwen2_vl.{'0' * 32}.partial",
        f"08_reporting/.runs_side_by_side.html.{'0' * 32}.partial",
        f"09_workspace/tiny/images/.{'a' * 64}.png.{'0' * 32}.partial",
        f"09_workspace/tiny/launches/.0123456789ab.{'0' * 32}.partial",
        f"09_workspace/tiny/images/.{'a' * 64}.png.4711",  # the forms of earlier versions
        f"09_workspace/tiny/images/fetched/.{'b' * 64}.4711",
        "04_feature/tiny/image_features/0123/.key.json.4711",
        "09_workspace/tiny/export/merged_model",
    ]
    for name in left:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    assert removed(tmp_path) == set(left)


def test_what_lies_beside_the_recipes_stays_while_any_run_is_under_way(tmp_path, history, record):
    history("d1", DATA)
    busy = record("other", recipe="another", outcome="running")
    lock = Lock(busy.folder / ".lock")
    assert lock.acquire()
    (tmp_path / "data/06_models").mkdir(parents=True, exist_ok=True)
    (tmp_path / f"data/06_models/.tiny_qwen2_vl.{'0' * 32}.partial").mkdir()
    assert removed(tmp_path) == set()
    lock.release()


def test_pictures_that_no_manifest_names_go(tmp_path, history):
    history("d1", DATA)
    root = tmp_path / "data/02_intermediate/tiny/images"
    (root / "files").mkdir(parents=True)
    for name in ("aa.png", "bb.png"):
        (root / "files" / name).touch()
    manifest = root / "manifest.csv" / "d1" / "manifest.csv"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("id,sha256,path,width\n1,aa,data/02_intermediate/tiny/images/files/aa.png,3\n")
    assert removed(tmp_path) == {"02_intermediate/tiny/images/files/bb.png"}


def test_the_parent_of_a_training_that_can_be_gone_on_with_stays(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training")
    history("t2", ["adapter"], {"train_conversations": "d1"}, "training")
    job = tmp_path / "data/09_workspace/tiny/training/unfinished"
    (job / "checkpoint-3").mkdir(parents=True)
    (job / "inputs.json").write_text("{}")
    (job / "parent.txt").write_text("data/05_model_input/tiny/adapter/t1/adapter")
    assert "05_model_input/tiny/adapter/t1" not in removed(tmp_path)
    (job / "checkpoint-3").rmdir()
    assert "05_model_input/tiny/adapter/t1" in removed(tmp_path)


def test_what_the_catalog_keeps_elsewhere_is_pruned_there(tmp_path, history):
    history("d1", DATA)
    history("t1", ["adapter"], {"train_conversations": "d1"}, "training")
    work, store = tmp_path / "fast/work", tmp_path / "pictures/manifest.csv"
    moved = {"workspace": work, "images": store, "image_features": tmp_path / "fast/features"}
    left = [
        work / "training/ended/inputs.json",
        work / "export/merged_model",
        work / f"images/.{'a' * 64}.png.{'0' * 32}.partial",
        store.parent / "files/bb.png",
        tmp_path / "fast/features/0123/key.json",
    ]
    for path in [*left, store.parent / "files/aa.png", store / "d1/manifest.csv"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (store / "d1/manifest.csv").write_text("id,sha256,path,width\n1,aa,pictures/files/aa.png,3\n")
    assert removed(tmp_path, moved=moved) == {
        "../fast/work/training/ended",
        "../fast/work/export/merged_model",
        f"../fast/work/images/.{'a' * 64}.png.{'0' * 32}.partial",
        "../pictures/files/bb.png",
        "../fast/features/0123",
    }


def test_an_adapter_that_the_catalog_keeps_elsewhere_keeps_what_it_was_trained_on(tmp_path, history):
    history("d1", DATA)
    history("d2", DATA)
    adapter = tmp_path / "adapters/a1/adapter"
    adapter.mkdir(parents=True)
    path = "data/05_model_input/tiny/train_conversations/d1/train_conversations"
    text = {"base_model": {"name": "owner/hub@1"}, "run": {"read": {"train_conversations": {"path": path}}}}
    (adapter / "adapter_record.json").write_text(json.dumps(text))
    moved = {"adapter": tmp_path / "adapters"}
    assert removed(tmp_path, moved=moved) == {"05_model_input/tiny/test_conversations/d1"}
    assert len(removed(tmp_path)) == 2


def test_a_version_is_followed_to_where_the_catalog_keeps_its_dataset_and_nowhere_else(tmp_path):
    folder = tmp_path / "pictures/manifest.csv/v1"
    folder.mkdir(parents=True)
    artifact = {"version": "v1", "path": "pictures/manifest.csv/v1/manifest.csv"}
    assert version_folder(tmp_path, "tiny", artifact, tmp_path / "pictures/manifest.csv") == folder
    assert version_folder(tmp_path, "tiny", artifact, tmp_path / "data/manifest.csv") is None
    above = {"version": "..", "path": "pictures/manifest.csv/../manifest.csv"}
    assert version_folder(tmp_path, "tiny", above, tmp_path / "pictures/manifest.csv") is None


def test_tokenised_samples_go_with_the_conversations_behind_them(history, tmp_path):
    history("d1", DATA)
    history("t1", ["adapter"], read={"train_conversations": "d1"}, stage="training")
    history("d2", DATA)
    history("t2", ["adapter"], read={"train_conversations": "d2"}, stage="training")
    workspace = tmp_path / "data/09_workspace/tiny/tokenised"
    for name, text in {
        "old": '{"key": {"conversations": "train_conversations of d1"}}',
        "new": '{"key": {"conversations": "train_conversations of d2"}}',
        "damaged": "{",
    }.items():
        (workspace / name).mkdir(parents=True)
        (workspace / name / "samples.json").write_text(text)
    gone = {path for path in removed(tmp_path) if path.startswith("09_workspace")}
    assert gone == {"09_workspace/tiny/tokenised/old", "09_workspace/tiny/tokenised/damaged"}
