"""`swanlab watch` shows a run of mode `local`; needs SwanLab's board, which the project's own environment lacks."""

import json
import socket
import subprocess
import sys
import urllib.request

import pytest

from tracking.runs import METRICS, losses, pictures, records, train, wait_for

pytest.importorskip("swanboard", reason="pip install 'swanlab[dashboard]'")


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def watch():
    """`watch(folder)` starts the board; what it gives asks it: `ask("/project")`."""
    started = []

    def start(folder):
        command = [sys.executable, "-u", "-c", "from swanlab.cli import cli; cli()", "watch", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        started.append(process)
        line = next(line for line in process.stdout if "http://127.0.0.1" in line)  # the port may be another's
        address = line[line.index("http") :].split()[0].rstrip("/")
        port = int(address.rpartition(":")[2])
        wait_for(lambda: listens(port))  # it says so before it does

        def ask(path):
            with urllib.request.urlopen(f"{address}/api/v1{path}", timeout=10) as answer:
                return json.load(answer)["data"]

        return ask

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def test_curves_and_pictures_of_a_local_run_are_on_the_board(make_tracker, tmp_path, watch):
    tracker = make_tracker(mode="local")
    train(tracker)
    tracker.log_evaluation(METRICS, pictures)
    tracker.end("finished")
    ask = watch(tmp_path / "swanlab")
    (experiment,) = ask("/project")["experiments"]
    assert (experiment["name"], experiment["status"]) == ("an-experiment", 1)
    curve = ask(f"/experiment/{experiment['id']}/tag/train%2Floss")["list"]
    assert {int(point["index"]): point["data"] for point in curve} == pytest.approx(losses())
    (shown,) = ask(f"/experiment/{experiment['id']}/tag/Prediction")["list"]
    assert [more["caption"] for more in shown["more"]] == [text for _, text in pictures(2)]
    (record,) = records(tmp_path / "swanlab")
    assert all((record / "media" / "image" / name).is_file() for name in shown["data"])
