"""Every run that started a node leaves a record of what it read, wrote and was."""

import json
import os
import signal

import pytest

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.records import read_records, runs_folder
from qwen_vl_lora.samples import statistics
from qwen_vl_lora.training import train

TRAINING_INPUTS = {"images", "train_conversations", "validation_conversations"}


@pytest.fixture
def records(project):
    return lambda: read_records(runs_folder(project, "tiny"))


@pytest.fixture
def run(fresh_run):
    """Every run is a real one: their records are what is looked at."""
    return fresh_run


def test_a_training_can_be_told_from_its_record_and_from_its_adapters(run, records, newest, base_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    run("data_engineering")
    run("training", lora={"r": 3})
    data, training = records()
    assert [data.outcome, training.outcome] == ["finished", "finished"]
    assert training.facts["pipelines"] == ["training"]
    assert training.facts["parameters"]["lora"]["r"] == 3
    assert training.facts["threads"] >= 1
    assert {"torch", "transformers", "peft", "kedro"} <= training.facts["packages"].keys()
    assert training.facts["started"] < training.facts["ended"]
    assert training.facts["results"]["training_summary"]["steps"] > 0
    assert training.facts["node_seconds"].keys() >= {"encode_images", "train_adapter"}
    assert training.facts["node_seconds"]["train_adapter"] > 0
    assert {name: training.read[name]["version"] for name in TRAINING_INPUTS} == dict.fromkeys(TRAINING_INPUTS, data.id)
    assert training.read["images"]["sha256"] == data.written["images"]["sha256"]
    assert "base_model" not in data.facts
    everything = "".join(path.read_text() for path in training.folder.rglob("*") if path.is_file())
    assert "hunter2" not in everything

    adapter = json.loads((newest("06_models/tiny/adapter") / "adapter_record.json").read_text())
    assert adapter["run"]["id"] == training.id
    assert adapter["run"]["read"]["images"] == training.read["images"]
    assert adapter["run"]["read"]["base_model"]["sha256"] == training.read["base_model"]["sha256"]
    (key,) = adapter["run"]["read"]["image_features"]["keys"]
    assert all(name.startswith(f"{key}/") for name in training.read["image_features"]["files"])
    assert "files" in training.read["base_model"]
    assert not any("files" in artifact for artifact in adapter["run"]["read"].values())
    assert adapter["run"]["made_from"][0]["id"] == data.id
    assert adapter["run"]["made_from"][0]["source"]["describe"]["seed"] == 7
    assert adapter["run"]["made_from"][0]["parameters"]["captions"]["num_rows"] == 40
    assert adapter["base_model"]["fingerprint"] == training.facts["base_model"]["fingerprint"]
    assert {"packages", "code_sha256", "threads", "cpu_capability"} <= adapter["run"].keys()


def test_a_failed_run_says_where_it_stopped(run, records):
    run("data_engineering")
    with pytest.raises(DataFormatError):
        run("training", max_length=40)
    failed = records()[-1]
    assert failed.outcome == "failed"
    assert "longer than max_length 40" in failed.facts["message"]
    assert "image_features" in failed.written
    assert "adapter" not in failed.written


def test_a_run_that_never_starts_a_node_leaves_nothing(run, project):
    with pytest.raises(MissingArtifactError):
        run("training")
    assert not (project / "data" / "08_reporting").exists()


def test_a_broken_off_run_is_interrupted_and_the_next_one_says_so(run, records, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(statistics, "describe_captions", stop)
        run("data_engineering")
    run("data_engineering")
    assert [record.outcome for record in records()] == ["interrupted", "finished"]
    assert [record.sequence for record in records()] == [1, 2]


def test_a_killed_run_is_interrupted_though_it_could_not_say_so(run, records, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(statistics, "describe_captions", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
        try:
            run("data_engineering")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (killed,) = records()
    assert killed.facts["outcome"] == "running"
    assert killed.outcome == "interrupted"
    assert "images" in killed.written
    assert killed.complete_versions() == {}


def test_a_pipeline_alone_reads_the_newest_complete_data_run(run, records, monkeypatch):
    run("data_engineering")

    def fail(*arguments):
        raise DataFormatError("half of it is done")

    with monkeypatch.context() as patch, pytest.raises(DataFormatError, match="half of it"):
        patch.setattr(statistics, "describe_captions", fail)
        run("data_engineering", captions={"num_rows": 30})
    run("training")
    whole, half, training = records()
    assert "images" in half.written
    assert {training.read[name]["version"] for name in TRAINING_INPUTS} == {whole.id}
    run("data_engineering", captions={"num_rows": 30})
    run("evaluation")
    evaluation = records()[-1]
    assert evaluation.read["adapter"]["version"] == training.id
    assert evaluation.read["test_conversations"]["version"] == whole.id


def test_an_unfinished_run_goes_on_after_training_without_training_again(run, records, monkeypatch, newest):
    def fail(*arguments):
        raise DataFormatError("the machine went away")

    with monkeypatch.context() as patch, pytest.raises(DataFormatError, match="went away"):
        run("data_engineering")
        patch.setattr(train, "stage_adapter", fail)
        run("training")
    steps = []
    monkeypatch.setattr(train.TrainingLoop, "compute_gradients", lambda *a: steps.append(a))
    run("training")
    assert steps == []
    assert records()[-1].facts["results"]["training_summary"]["resumed_from"].startswith("checkpoint-")
    assert newest("06_models/tiny/adapter").is_dir()
