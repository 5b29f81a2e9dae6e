"""`kedro run` over several processes gives what one process gives, once, and leaves none behind."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import living, marked, wait_until
from command_line import TRAINING_SLICE, call, kedro_run, make_project

SETTINGS = {
    **TRAINING_SLICE,
    "lora.lora_dropout": 0.0,
    "lora.r": 4,
    "image.resized_height": 280,  # so large that the pictures do not fit into one batch
    "image.resized_width": 280,
    "generation.batch_size": 1,
}
TWO_PROCESSES = {"cluster.processes": 2, "training_args.per_device_train_batch_size": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory, base_path):
    """A project with data, trained and evaluated by one process; its adapter, features and predictions."""
    project = make_project(tmp_path_factory.mktemp("one") / "project")
    settings = {**SETTINGS, "base_model": base_path("qwen2_vl")}
    done = call(kedro_run("data_engineering,training,evaluation", **settings), project)
    assert done.returncode == 0, done.stderr
    return project, settings, results(project)


@pytest.fixture
def mark():
    with marked() as mark:
        yield mark
    assert wait_until(lambda: not living(mark), 15), living(mark)


def newest(project, path):
    return sorted((project / "data" / path).iterdir())[-1]


def results(project):
    adapter = newest(project, "06_models/tiny/adapter") / "adapter" / "adapter_model.safetensors"
    predictions = newest(project, "07_model_output/tiny/predictions.csv") / "predictions.csv"
    shards = (project / "data/04_feature/tiny/image_features").glob("*/*.safetensors")
    features = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    return load_file(adapter), pd.read_csv(predictions, dtype=str), features


def forget_features(project):
    for shard in (project / "data/04_feature").rglob("*.safetensors"):
        shard.unlink()


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-3, atol=1e-5), name


def versions(project):
    return {path.parent.name: len(list(path.parent.iterdir())) for path in (project / "data").glob("0[678]*/*/*/*T*Z")}


def shares(project):
    """What the processes of the newest run did, by node."""
    record = json.loads((newest(project, "08_reporting/tiny/runs") / "record.json").read_text())
    return {node: work["processes"] for node, work in record["work"].items()}


def test_two_processes_give_what_one_gives_and_save_it_once(reference, mark):
    project, settings, (adapter, predictions, features) = reference
    forget_features(project)
    before = versions(project)
    done = call(kedro_run("training,evaluation", **{**settings, **TWO_PROCESSES}), project)
    assert done.returncode == 0, done.stderr
    added = {name: count - before[name] for name, count in versions(project).items()}
    assert max(added.values()) == 1
    assert added["adapter"] == added["training_log.csv"] == added["predictions.csv"] == 1
    again, captions, encoded = results(project)
    assert features.keys() == encoded.keys()
    assert all(torch.equal(encoded[name], value) for name, value in features.items())
    assert_close(adapter, again)
    pd.testing.assert_frame_equal(captions, predictions)
    said = done.stdout + done.stderr
    assert said.count("train runs in 2 processes") == 1
    assert " ".join(said.split()).count("in 2 processes (process") == 2  # pictures and captions
    assert said.count("Step 1 of") == 1
    done_by = shares(project)
    assert sum(done_by["encode_images"].values()) == len(features)
    assert sum(done_by["generate_captions"].values()) == len(predictions)  # those of the base are kept


def test_three_processes_encode_what_one_encodes(reference, mark):
    project, settings, (_, _, features) = reference
    forget_features(project)
    command = [*kedro_run("training", **{**settings, "cluster.processes": 3}), "--to-nodes", "encode_images"]
    done = call(command, project)
    assert done.returncode == 0, done.stderr
    shards = (project / "data/04_feature/tiny/image_features").glob("*/*.safetensors")
    encoded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert encoded.keys() == features.keys()
    assert all(torch.equal(encoded[name], value) for name, value in features.items())
    assert sum(shares(project)["encode_images"].values()) == len(features)


def test_several_processes_caption_loose_pictures_as_one_does(reference, mark):
    project, settings, _ = reference
    pictures = {"inference.images": "data/02_intermediate/tiny/images/files"}
    tables = []
    for processes in (3, 2, 1):
        command = kedro_run("inference", **{**settings, **pictures, "cluster.processes": processes})
        done = call(command, project)
        assert done.returncode == 0, done.stderr
        table = newest(project, "07_model_output/tiny/captions.csv") / "captions.csv"
        tables.append(pd.read_csv(table, dtype=str))
        assert sum(shares(project)["caption_pictures"].values()) == len(tables[-1])
        for notes in (project / "data/09_workspace/tiny/inference").iterdir():
            notes.unlink()
    for several in tables[:2]:
        pd.testing.assert_frame_equal(several, tables[2])
    assert len(tables[0]) > 10
