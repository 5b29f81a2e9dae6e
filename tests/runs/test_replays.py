"""A replay gives the same bits, also in another place; `verify` names what differs."""

import csv
import json
import re
import shutil
import sys

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import command_line
from qwen_vl_lora.cli import cli
from qwen_vl_lora.runs.artifacts import log_without_timing
from qwen_vl_lora.runs.records import in_todays_names, read_records, runs_folder


def call(*arguments):
    return CliRunner().invoke(cli, arguments, catch_exceptions=False)


def results(project, version):
    adapter = project / "data/06_models/tiny/adapter" / version / "adapter"
    log = project / "data/08_reporting/tiny/training_log.csv" / version / "training_log.csv"
    return (adapter / "adapter_model.safetensors").read_bytes(), log_without_timing(log)


def clone(project, folder, training, data):
    """A fresh clone at another path: configuration, the run's folder and its inputs; no earlier outputs."""
    for name in (
        "conf",
        "pyproject.toml",
        f"data/08_reporting/tiny/runs/{training}",
        "data/02_intermediate/tiny/images",
    ):
        copy = shutil.copytree if (project / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(project / name, folder / name)
    for name in ("train_conversations.json", "validation_conversations.json"):
        inputs = f"data/05_model_input/tiny/{name}/{data}"
        shutil.copytree(project / inputs, folder / inputs)
    (folder / "src").mkdir()
    # The clone's own configuration has moved on: a replay uses the run's.
    parameters = folder / "conf/base/parameters.yml"
    parameters.write_text(parameters.read_text().replace("learning_rate: 3.0e-3", "learning_rate: 1.0e-5"))
    return folder


def test_a_replay_in_a_fresh_clone_gives_the_same_bits(run, project, tmp_path_factory):
    run("data_engineering")
    run("training", lora={"r": 3})
    data, training = read_records(runs_folder(project, "tiny"))
    there = clone(project, tmp_path_factory.mktemp("clone"), training.id, data.id)
    replay = f"data/08_reporting/tiny/runs/{training.id}/replay.yml"
    command = [sys.executable, "-m", "kedro", "run", "--config", replay]
    replayed = command_line.call(command, there)
    assert replayed.returncode == 0, replayed.stderr
    record = read_records(runs_folder(there, "tiny"))[-1]
    assert results(there, record.id) == results(project, training.id)

    shutil.copytree(record.folder, runs_folder(project, "tiny") / record.id)
    compared = call("verify", training.id, record.id)
    assert "artifacts: the same\nparameters: the same" in compared.output
    assert compared.exit_code == 0


def test_a_run_whose_catalog_keeps_pictures_outside_data_is_replayed_there(run, project):
    kind = "qwen_vl_lora.datasets.previews.ImageTableDataset"
    entry = {"type": kind, "filepath": "pictures/manifest.csv", "versioned": True}
    (project / "conf/mine").mkdir()
    (project / "conf/mine/catalog.yml").write_text(json.dumps({"images": entry}))  # JSON is YAML
    run("data_engineering", env="mine")
    (record,) = read_records(runs_folder(project, "tiny"))
    command = [sys.executable, "-m", "kedro", "run", "--config", str(record.folder / "replay.yml")]
    replayed = command_line.call(command, project)
    assert replayed.returncode == 0, replayed.stderr
    replay = read_records(runs_folder(project, "tiny"))[-1]
    assert replay.written["images"]["path"] == f"pictures/manifest.csv/{replay.id}/manifest.csv"

    (record.folder / "seal").write_text("0" * 64)
    refused = command_line.call(command, project)
    assert refused.returncode == 1
    assert "filepath must lie below data/" in " ".join(refused.stderr.split())


def test_a_run_that_an_older_version_recorded_is_replayed_under_todays_names(run, project):
    run("data_engineering")
    (record,) = read_records(runs_folder(project, "tiny"))
    old = {"nproc_per_node": 1, "nnodes": 1, "rdzv_endpoint": None, "rdzv_timeout": 900, "timeout": 1700}
    stored = record.folder / "conf/base/parameters.yml"
    parameters = yaml.safe_load(stored.read_text())
    assert parameters.pop("cluster")
    stored.write_text(yaml.safe_dump({"launcher": old, **parameters}))
    told = json.loads((record.folder / "record.json").read_text())
    told["parameters"] = {"launcher": old, **parameters}
    (record.folder / "record.json").write_text(json.dumps(told))

    replayed = command_line.call(
        [sys.executable, "-m", "kedro", "run", "--config", str(record.folder / "replay.yml")], project
    )
    assert replayed.returncode == 0, replayed.stderr
    assert "names `launcher`, which is now `cluster`" in " ".join((replayed.stdout + replayed.stderr).split())
    older, newer = read_records(runs_folder(project, "tiny"))
    assert older.facts["parameters"] == newer.facts["parameters"]
    assert newer.facts["parameters"]["cluster"]["timeout"] == 1700
    assert newer.written["samples"]["sha256"] == older.written["samples"]["sha256"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"nproc_per_node": 4, "nnodes": 2, "timeout": 60}, {"address": "auto", "processes": 8, "timeout": 60}),
        ({"nproc_per_node": "auto"}, {"address": None, "processes": "auto", "timeout": 1800}),
    ],
)
def test_the_old_names_of_processes_become_the_new_ones(old, new):
    assert in_todays_names({"launcher": old, "rows": "shared"}) == {
        "cluster": {**new, "gpus_per_process": 1},
        "rows": "shared",
    }
    assert in_todays_names({"rows": "shared"}) == {"rows": "shared"}


def bend(weights):
    """One weight becomes another."""
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, {"format": "pt"})


def test_verify_names_each_thing_that_changes_on_the_disk(run, project, base_path, tmp_path_factory):
    base = shutil.copytree(base_path("qwen2_vl"), tmp_path_factory.mktemp("base") / "base")
    run("data_engineering")
    run("training", base_model=str(base))
    picture = next((project / "data/02_intermediate/tiny/images/files").iterdir())
    (conversations,) = (project / "data/05_model_input/tiny/train_conversations.json").glob("*/*.json")
    parameters, catalog = (project / "conf/base" / name for name in ("parameters.yml", "catalog.yml"))
    changes = [
        (
            conversations,
            lambda file: file.write_text(file.read_text().replace("circle", "Circle", 1)),
            f"artifact that differs: train_conversations: {conversations.relative_to(project)} has different bytes",
        ),
        (
            picture,
            lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
            f"artifact that differs: images: picture 'scene_.*{picture.name} has different bytes",
        ),
        (
            base / "model.safetensors",
            bend,
            f"artifact that differs: base_model: {base}/model.safetensors has different bytes",
        ),
        (
            parameters,
            lambda file: file.write_text(file.read_text().replace("  r: 64", "  r: 8")),
            "parameter that differs: lora.r: 64 → 8",
        ),
        (
            catalog,
            lambda file: file.write_text(file.read_text().replace("seed: 7", "seed: 8")),
            "parameter that differs: catalog.captioned_images.seed: 7 → 8",
        ),
    ]
    for file, change, message in changes:
        unchanged = call("verify", "latest")
        assert unchanged.exit_code == 0, unchanged.output
        assert "artifacts: the same\nparameters: the same" in unchanged.output
        before = file.read_bytes()
        change(file)
        said = call("verify", "latest")
        assert said.exit_code == 1
        assert re.search(f"first {message}", said.output), said.output
        assert "that differ after it" not in said.output
        file.write_bytes(before)


def test_verify_names_one_changed_weight_of_the_base_between_runs(run, project, base_path, tmp_path_factory):
    run("data_engineering")
    one, two = (shutil.copytree(base_path("qwen2_vl"), tmp_path_factory.mktemp("base") / "base") for _ in range(2))
    bend(two / "model.safetensors")
    for base in (one, two):
        run("training", base_model=str(base), training_args={"max_steps": 1})
    first, second = read_records(runs_folder(project, "tiny"))[1:]
    said = call("verify", first.id, second.id)
    assert said.exit_code == 1
    assert "first artifact that differs: base_model: different bytes in model.safetensors" in said.output


@pytest.fixture
def own(run, project):
    """`own(captions)`: a data run on two pictures of one's own."""

    def go(captions=("A red square.", "A blue square."), colours=("red", "blue")):
        for name, colour in zip("ab", colours, strict=True):
            Image.new("RGB", (64, 64), colour).save(project / f"{name}.png")
        with (project / "captions.csv").open("w", newline="") as table:
            csv.writer(table).writerows([("image_path", "caption"), *zip(("a.png", "b.png"), captions, strict=True)])
        split = {"test_images": 1, "validation_images": 0}
        run("data_engineering", env="own_captions", captions_file="captions.csv", split=split)
        return read_records(runs_folder(project, "own_captions"))[-1].id

    return go


def test_verify_names_a_changed_caption_between_runs(own):
    said = call("verify", own(), own(captions=("A red square.", "A navy square.")))
    assert said.exit_code == 1
    assert "first artifact that differs: captioned_images" in said.output
    assert "samples" in said.output
    assert "A blue square." in said.output
    assert "A navy square." in said.output


def test_verify_names_a_changed_picture_between_runs(own):
    said = call("verify", own(), own(colours=("red", "navy")))
    assert said.exit_code == 1
    assert "first artifact that differs: images: " in said.output


def test_verify_names_a_changed_setting_between_runs(run, project):
    run("data_engineering")
    run("training", lora={"r": 4})
    run("training", lora={"r": 2})
    _, one, two = read_records(runs_folder(project, "tiny"))
    said = call("verify", one.id, two.id)
    assert said.exit_code == 1
    assert "first artifact that differs: adapter: different bytes in adapter_config.json, adapter_model" in said.output
    assert "first parameter that differs: lora.r: 4 → 2" in said.output
    listed = call("runs", one.id, two.id).output
    assert "lora.r" in listed
    assert "loss" in listed
    assert one.id in call("runs").output


def test_a_foreign_replay_that_names_a_class_is_refused(run, project):
    run("data_engineering")
    (record,) = read_records(runs_folder(project, "tiny"))
    catalog = record.folder / "conf/base/catalog.yml"
    catalog.write_text(catalog.read_text().replace("json.JSONDataset", "pickle.PickleDataset"))
    replay = record.folder / "replay.yml"
    command = [sys.executable, "-m", "kedro", "run", "--config", str(replay)]
    refused = command_line.call(command, project)
    assert refused.returncode == 1
    assert "pickle.PickleDataset" in " ".join(refused.stderr.split())
    assert len(read_records(runs_folder(project, "tiny"))) == 1

    replay.write_text("run:\n  runner: antigravity.fly\n")
    refused = command_line.call(command, project)
    assert refused.returncode == 1
    assert "names the runner 'antigravity.fly'" in " ".join(refused.stderr.split())


def test_prune_shows_first_and_keeps_what_the_newest_adapter_names(run, project, newest):
    run("data_engineering")
    run("data_engineering", captions={"num_rows": 30})
    run("training", captions={"num_rows": 30})
    first, second, training = read_records(runs_folder(project, "tiny"))
    shown = call("prune")
    assert f"would remove data/05_model_input/tiny/train_conversations.json/{first.id}" in shown.output
    assert "Nothing was removed" in shown.output
    assert (project / first.written["samples"]["path"]).exists()
    assert "removed data/" in call("prune", "--yes").output
    assert not (project / first.written["samples"]["path"]).exists()
    named = json.loads((newest("06_models/tiny/adapter") / "adapter_record.json").read_text())["run"]["read"]
    assert all((project / artifact["path"]).exists() for artifact in named.values())
    assert call("verify", training.id).exit_code == 0
    assert second.written["samples"]["version"] in call("runs", second.id).output
    assert call("prune", "--yes").output.startswith("tiny: 0 removals")
