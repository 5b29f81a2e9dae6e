"""A run is on a real `mlflow server`, in one run however often it resumes, and no server keeps it from ending."""

import importlib.util
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import MLflowParameters
from qwen_vl_lora.tracking import mlflow
from qwen_vl_lora.tracking import tracker as tracking
from qwen_vl_lora.tracking.mlflow import MLflowTracker
from tracking.mlflow_server import Door, MLflowServer, free_port
from tracking.runs import METRICS, losses, pictures, train, wait_for

RUN = "2026-01-02T03.04.05.678Z"
SECRETS = ("ghp_abcdefghijklmnopqrstuvwx0123", "hunter2", "sk-abcdefghijklmnopqrst")
LONG = "typed by hand, " * 500

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="requirements-dev.txt has mlflow")


def describe():
    lora = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    many = {f"key_{number}": number for number in range(120)}
    source = f"https://me:{SECRETS[1]}@host/x.csv"
    parameters = {"lora": lora, "prompt": {"user": LONG, "system": SECRETS[2]}, "many": many, "captions_file": source}
    return {"run": RUN, "recipe": "tiny", "data": {"adapter": "v1"}, "parameters": parameters}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.close()


@pytest.fixture
def door(server):
    door = Door(server)
    yield door
    door.close()


@pytest.fixture(autouse=True)
def hear_all(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture
def make_tracker(monkeypatch, request, tmp_path):
    """`make_tracker(address)`: a run that MLflow alone is told of, in an experiment of the test's own name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "current_run", lambda: SimpleNamespace(outline=describe))
    made = []

    def make(address, **changes):
        settings = MLflowParameters(tracking_uri=address, experiment=name_of(request), prediction_images=2, **changes)
        made.append(tracking.TrackedRun([MLflowTracker(settings, [])]))
        return made[-1]

    yield make
    for tracker in made:
        tracker.end("interrupted")


@pytest.fixture
def patient(monkeypatch):
    """The end of a run waits long enough for a busy machine."""
    monkeypatch.setattr(mlflow, "END_SECONDS", 90)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


def name_of(request):
    return request.node.originalname


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def end(tracker, error=None):
    """The end of a run that was evaluated. Returns its seconds."""
    began = time.monotonic()
    tracker.log_evaluation(METRICS, pictures)
    tracker.end("failed" if error else "finished", error)
    return time.monotonic() - began


def values(run, kind):
    return {entry["key"]: entry["value"] for entry in run["data"][kind]}


@needs_mlflow
def test_a_training_and_what_resumes_it_are_one_run_with_everything_and_no_secret(
    make_tracker, server, door, request, tmp_path, caplog, patient
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    first = make_tracker(door.address)
    train(first, range(1, 7))
    first.end("interrupted", "Ctrl-C")
    (run,) = server.runs(name_of(request))
    assert run["info"]["status"] == "KILLED"
    second = make_tracker(door.address)
    train(second)
    second.log_adapter(adapter)
    end(second, f"failed with password={SECRETS[1]}")

    (run,) = server.runs(name_of(request))
    assert (run["info"]["run_name"], run["info"]["status"]) == (RUN, "FAILED")
    parameters, tags = values(run, "params"), values(run, "tags")
    assert parameters["lora.r"] == "8"
    assert parameters["lora.target_modules"] == '["q_proj", "v_proj"]'
    assert parameters["many.key_119"] == "119"
    assert parameters["prompt.user"] == f"{LONG[:5999]}…"
    assert (tags["recipe"], tags["data.adapter"], tags["error"]) == ("tiny", "v1", "failed with password=***")
    assert server.curve(run, "train/loss") == [(step, pytest.approx(loss)) for step, loss in losses().items()]
    assert server.curve(run, "evaluation/tuned/CIDEr") == [(12, 1.0)]
    files = server.files(run)
    assert server.read(run, "adapter/adapter_config.json") == b'{"r": 8}'
    assert len([path for path in files if path.endswith(".png")]) == 2
    assert server.read(run, "predictions.txt").decode().count("tuned: short") == 2
    assert f"runs/{run['info']['run_id']}" in caplog.text
    assert warnings(caplog) == []
    sent = b"".join(door.received)
    assert b"***" in sent
    assert not [secret for secret in SECRETS if secret.encode() in sent]


@needs_mlflow
@pytest.mark.parametrize("fault", ["silent", *(pytest.param(f, marks=pytest.mark.slow) for f in ("down", "errors"))])
def test_a_server_that_is_no_use_costs_one_line_and_no_time(make_tracker, monkeypatch, caplog, fault):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    door = Door(SimpleNamespace(port=0))
    door.behaviour = fault
    try:
        address = f"http://me:{SECRETS[1]}@127.0.0.1:{free_port() if fault == 'down' else door.address.split(':')[-1]}"
        tracker = make_tracker(address)
        began = time.monotonic()
        train(tracker)
        tracker.log_adapter(Path("adapter"))
        assert time.monotonic() - began < 3
        assert end(tracker) < 15
    finally:
        door.close()
    (said,) = warnings(caplog)
    assert "MLflow's server is not used: " in said
    assert "training_log.csv and the report have all of it." in said
    assert SECRETS[1] not in caplog.text


@needs_mlflow
@pytest.mark.slow
def test_what_a_server_misses_while_it_is_away_is_sent_when_it_is_back(
    make_tracker, server, door, request, caplog, patient
):
    tracker = make_tracker(door.address)
    train(tracker, range(1, 7))
    wait_for(lambda: any(b"train/loss" in line for line in door.received))
    door.behaviour = "errors"
    train(tracker, range(7, 12))
    time.sleep(0.5)
    door.behaviour = "well"
    train(tracker, [12])
    end(tracker)
    (run,) = server.runs(name_of(request))
    assert server.curve(run, "train/loss") == [(step, pytest.approx(loss)) for step, loss in losses().items()]
    assert run["info"]["status"] == "FINISHED"
    assert warnings(caplog) == []


@needs_mlflow
@pytest.mark.slow
def test_an_adapter_that_cannot_be_sent_in_time_is_named_with_the_command(make_tracker, door, tmp_path, caplog):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").symlink_to("a file that is lost")
    tracker = make_tracker(door.address)
    train(tracker)
    tracker.log_adapter(adapter)
    assert end(tracker) < 15
    (said,) = warnings(caplog)
    assert f"MLFLOW_TRACKING_URI={door.address} mlflow artifacts log-artifacts --run-id " in said
    assert "--artifact-path adapter --local-dir adapter" in said


PROCESS = """
import os, signal, sys
from qwen_vl_lora.parameters import MLflowParameters
from qwen_vl_lora.tracking.mlflow import MLflowTracker
from qwen_vl_lora.tracking.tracker import TrackedRun
sys.path.insert(0, {tests!r})
from tracking.runs import train

tracker = TrackedRun([MLflowTracker(MLflowParameters(tracking_uri={address!r}, experiment={name!r}), [])])
train(tracker)
os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_mlflow
def test_a_killed_run_keeps_what_it_logged_and_is_marked(server, request, tmp_path):
    program = PROCESS.format(tests=str(Path(__file__).parents[1]), address=server.address, name=name_of(request))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL

    def marked():
        try:
            return [run for run in server.runs(name_of(request)) if run["info"]["status"] == "KILLED"]
        except OSError:  # not there yet
            return []

    wait_for(marked)
    (run,) = marked()
    assert server.curve(run, "train/loss") == [(step, pytest.approx(loss)) for step, loss in losses().items()]


def find(*names):
    return lambda name: object() if name in names else None


def test_without_mlflow_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", find())
    with pytest.raises(ParameterError, match="MLflow is not installed: pip install 'mlflow-skinny>=3.1'"):
        MLflowTracker(MLflowParameters(), [])


def test_without_the_address_of_a_server_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", find("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ParameterError, match=r"set mlflow\.tracking_uri, .*MLFLOW_TRACKING_URI in the environment"):
        MLflowTracker(MLflowParameters(), [])


def test_the_parameter_comes_before_the_file_of_kedro_mlflow_and_that_before_the_environment(
    monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(importlib.util, "find_spec", find("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    base, local = tmp_path / "base", tmp_path / "local"
    base.mkdir()
    assert of(base, local) == ("http://environment", "qwen-vl-lora")
    (base / "mlflow.yml").write_text(
        "server: {mlflow_tracking_uri: 'http://base'}\ntracking: {experiment: {name: a}}\n"
    )
    assert of(base, local) == ("http://base", "a")
    local.mkdir()
    (local / "mlflow.yml").write_text("server: {mlflow_tracking_uri: 'http://local', credentials: mine}\n")
    assert of(base, local) == ("http://local", "a")
    assert "not used here: server.credentials" in caplog.text
    assert of(base, local, tracking_uri="http://typed", experiment="b") == ("http://typed", "b")
    (local / "mlflow.yml").write_text("server: {mlflow_tracking_uri: '${nowhere:x}'}\n")
    with pytest.raises(ParameterError, match=r"mlflow\.yml cannot be read .*set mlflow\.tracking_uri"):
        of(base, local)


def of(base, local, **settings):
    tracker = MLflowTracker(MLflowParameters(**settings), [base, local])
    return tracker._uri, tracker._experiment
