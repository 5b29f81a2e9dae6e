"""`kedro run` over several processes and machines gives what one process gives, once, and leaves none behind."""

import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from command_line import TRAINING_SLICE, call, kedro_run, make_project
from ranks.processes import living, marked, wait_until

SETTINGS = {
    **TRAINING_SLICE,
    "lora.lora_dropout": 0.0,
    "lora.r": 4,
    "image.resized_height": 280,  # so large that the pictures do not fit into one batch
    "image.resized_width": 280,
    "generation.batch_size": 1,
}
TWO_PROCESSES = {"launcher.nproc_per_node": 2, "training_args.per_device_train_batch_size": 2}

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
    for work in ("encode_rank", "train_rank", "compare_rank"):
        assert said.count(f"{work} runs in 2 processes") == 1
    assert said.count("Step 1 of") == 1


def test_two_processes_caption_loose_pictures_as_one_does(reference, mark):
    project, settings, _ = reference
    pictures = {"inference.images": "data/02_intermediate/tiny/images/files"}
    tables = []
    for processes in (2, 1):
        command = kedro_run("inference", **{**settings, **pictures, "launcher.nproc_per_node": processes})
        done = call(command, project)
        assert done.returncode == 0, done.stderr
        table = newest(project, "07_model_output/tiny/captions.csv") / "captions.csv"
        tables.append(pd.read_csv(table, dtype=str))
        for notes in (project / "data/09_workspace/tiny/inference").iterdir():
            notes.unlink()
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) > 10


@pytest.fixture
def endpoint():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def machines(reference, endpoint, mark, monkeypatch):
    """`machines(pipelines, …)`: the run's process and one worker's, both under way."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    project, settings, _ = reference
    started = []

    def start(pipelines, **changes):
        nodes = {"launcher.nnodes": 2, "launcher.rdzv_endpoint": endpoint}
        share = {"training_args.per_device_train_batch_size": 2}
        worker = [sys.executable, "-m", "qwen_vl_lora", "worker", "--rendezvous", endpoint]
        for command in (worker, kedro_run(pipelines, **{**settings, **nodes, **share, **changes})):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(command, cwd=project, **pipes))
        return started[1], started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_machines_give_what_one_process_gives(reference, machines):
    project, _, (adapter, predictions, features) = reference
    forget_features(project)
    run, worker = machines("training,evaluation")
    assert run.wait(300) == 0, run.stdout.read()
    assert worker.wait(30) == 0, worker.stdout.read()
    again, captions, encoded = results(project)
    assert features.keys() == encoded.keys()
    assert all(torch.equal(encoded[name], value) for name, value in features.items())
    assert_close(adapter, again)
    pd.testing.assert_frame_equal(captions, predictions)
    said = " ".join(worker.stdout.read().split())
    assert "Joined the run" in said
    assert "The run has finished." in said


LONG = {"training_args.num_train_epochs": 400, "resume": "never"}


@pytest.mark.parametrize(
    ("victim", "of_the_run", "of_the_worker"),
    [
        ("run", "", "The run at"),
        ("worker", "lost its connection to another rank", ""),
        ("run asked", "Stopped by SIGTERM after step", "The run has ended with an error"),
        ("worker asked", "Stopped by SIGTERM after step", "Stopped by SIGTERM after step"),
    ],
)
def test_when_one_machine_ends_so_does_the_other(machines, victim, of_the_run, of_the_worker):
    run, worker = machines("training", **LONG, **{"launcher.timeout": 20})
    heard = []
    for line in run.stdout:
        heard.append(line)
        if "Step 1 of" in line:
            break
    assert run.poll() is None, "".join(heard)
    process = run if victim.startswith("run") else worker
    process.send_signal(signal.SIGTERM if victim.endswith("asked") else signal.SIGKILL)
    assert run.wait(120) != 0
    assert worker.wait(60) != 0
    assert of_the_run in " ".join((run.stdout.read()).split())
    assert of_the_worker in " ".join(worker.stdout.read().split())
