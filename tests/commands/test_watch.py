"""`qwen-vl-lora watch` shows a default run that no tracker was told of, to this machine's browser alone."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from urllib.parse import quote

import pandas as pd
import pytest

from command_line import call, environment, make_project
from finished_project import finished_project
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.tracking.boards import SwanLabBoard, TensorBoardBoard, choose_board
from tracking.runs import wait_for

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None or importlib.util.find_spec("swanboard") is not None,
    reason="requirements-dev.txt has tensorboard; SwanLab's board comes before it",
)


def ask(address, data=None, **headers):
    named = {"Content-Type": "application/json", **{name.title(): value for name, value in headers.items()}}
    asked = urllib.request.Request(address, data, named)
    with urllib.request.urlopen(asked, timeout=20) as answer:
        return answer.read()


@needs_tensorboard
def test_a_finished_default_run_is_on_the_board_under_its_id_and_only_this_machines_pages_reach_it(
    tmp_path_factory, base_path
):
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qwen_vl_lora", "watch", "--no-browser", "--port", str(port)]
    server = subprocess.Popen(command, cwd=project, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        address = f"http://127.0.0.1:{port}"
        assert f"TensorBoard, recipe tiny, 1 stored runs added: {address}/" in said
        _wait_until_it_listens(port, server)
        (run,) = (project / "data/08_reporting/tiny/runs").glob("2*")
        wait_for(lambda: run.name in (tags := json.loads(ask(f"{address}/data/plugin/images/tags"))) and tags[run.name])
        assert json.loads(ask(f"{address}/data/runs")) == [run.name]
        (log,) = (project / "data/08_reporting/tiny/training_log.csv").glob("*/training_log.csv")
        rows = pd.read_csv(log).dropna(subset=["loss"])
        query = f"run={quote(run.name)}&tag={quote('train/loss', safe='')}"
        curve = json.loads(ask(f"{address}/data/plugin/scalars/scalars?{query}"))
        assert [(step, value) for _, step, value in curve] == [
            (row.step, pytest.approx(row.loss, rel=1e-6)) for row in rows.itertuples()
        ]
        assert len(json.loads(ask(f"{address}/data/plugin/images/tags"))[run.name]) == 8
        assert json.loads(ask(f"{address}/data/plugin/hparams/experiment", b"{}"))["hparamInfos"]
        for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                ask(f"{address}/data/runs", **headers)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
        server.stdout.close()
    assert server.returncode == 130


def _wait_until_it_listens(port, server):
    def listens():
        assert server.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens)


@pytest.mark.parametrize(
    ("installed", "board"), [({"swanboard", "tensorboard"}, SwanLabBoard), ({"tensorboard"}, TensorBoardBoard)]
)
def test_swanlabs_board_is_taken_if_it_is_installed_else_tensorboard(monkeypatch, tmp_path, installed, board):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert isinstance(choose_board(tmp_path, "tiny"), board)


def test_without_a_board_the_command_that_installs_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingArtifactError, match=r"pip install 'tensorboard>=2\.20' \(or 'swanlab\[dashboard\]'"):
        choose_board(tmp_path, "tiny")


def test_without_runs_it_says_what_makes_one(tmp_path):
    done = call([sys.executable, "-m", "qwen_vl_lora", "watch"], make_project(tmp_path / "project"))
    assert done.returncode == 1
    assert "No run is recorded yet. `kedro run` makes one." in done.stderr
