"""`swanlab watch` shows a run of mode `local`; needs SwanLab's board, which the project's own environment lacks."""

import json
import os
import subprocess
import sys
import time
import urllib.request

import pytest

from tracking.runs import METRICS, losses, pictures, records, train

pytest.importorskip("swanboard", reason="pip install 'swanlab[dashboard]'")


@pytest.fixture
def board(tmp_path):
    """`board("/project")`: what the board answers, without a login, on the loopback."""
    (tmp_path / "swanlab").mkdir()
    # The port is the machine's next free one where this one is taken.
    program = "from swanlab.cli import cli; cli()"
    command = [sys.executable, "-u", "-c", program, "watch", str(tmp_path / "swanlab"), "--host", "127.0.0.1"]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path
    )
    for line in process.stdout:
        if "http://127.0.0.1" in line:
            address = line[line.index("http") :].split()[0].rstrip("/")
            break

    def ask(path):
        with urllib.request.urlopen(f"{address}/api/v1{path}", timeout=10) as answer:
            body = answer.read()
        return json.loads(body)["data"] if answer.headers["Content-Type"].startswith("application/json") else body

    yield ask
    process.terminate()
    process.wait(timeout=20)
    process.stdout.close()


def test_curves_and_pictures_of_a_local_run_are_on_the_board(make_tracker, tmp_path, board):
    tracker = make_tracker(mode="local")
    train(tracker)
    tracker.log_evaluation(METRICS, pictures)
    tracker.finish("success")
    time.sleep(0.5)
    (experiment,) = board("/project")["experiments"]
    assert (experiment["name"], experiment["status"]) == ("an-experiment", 1)
    curve = board(f"/experiment/{experiment['id']}/tag/train%2Floss")["list"]
    assert {int(point["index"]): point["data"] for point in curve} == pytest.approx(losses())
    (shown,) = board(f"/experiment/{experiment['id']}/tag/Prediction")["list"]
    assert [more["caption"] for more in shown["more"]] == [text for _, text in pictures(2)]
    (record,) = records(tmp_path / "swanlab")
    assert all((record / "media" / "image" / name).is_file() for name in shown["data"])
