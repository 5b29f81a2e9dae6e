"""Ranks and pieces in a Ray cluster keep what they promise on one machine, also when one of two machines is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cluster import works
from cluster.processes import wait_until
from cluster.ray_nodes import ADDRESS, Nodes
from command_line import TRAINING_SLICE, kedro_run, make_project

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two machines with one CPU each."""
    pytest.importorskip("ray", reason="pip install -e '.[cluster]'")
    alone = subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True, check=False)
    if alone.returncode and "CI" not in os.environ:
        pytest.skip("no network namespace is allowed here")
    nodes = Nodes(tmp_path_factory.mktemp("ray"))
    yield nodes
    nodes.stop()


def told(nodes, folder, *scenes, **options):
    """What `works.py` says of scenes that it plays one after the other, in one driver."""
    done = nodes.run([sys.executable, works.__file__, *scenes], cwd=folder, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def test_ranks_and_pieces_keep_their_promises(nodes, tmp_path):
    scenes, said = told(nodes, tmp_path, "who", "expected", "killed", "busy", "pieces", "pictures")
    who, expected, killed, busy, pieces, pictures = scenes
    assert [part["rank"] for part in who["given"]] == [0, 1]
    assert who["rows"] == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert "rank 0 speaks" in said
    assert "rank 1 speaks" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert expected == {"kind": "DataFormatError", "message": "Rank 1 of 2: Picture 7 is bad. Take another."}
    assert "(process 1 on" in killed["message"]
    assert "ended without a message: it was killed, or its machine is gone." in killed["message"]
    assert "No progress for 12 s: rank 1 (step 3) hangs while the others wait for it." in busy["message"]
    assert pieces["given"] == [number**2 for number in range(20)]
    assert "Its share is repeated" in said
    assert pictures["there"] == pictures["here"]
    assert len(pictures["there"]) == 12
    assert "PictureChecker: 6 pieces in 2 processes (" in said
    assert not nodes.processes("ray::_Rank")


def test_without_the_clusters_token_nothing_is_joined(nodes, tmp_path):
    without = {**nodes.environment, "HOME": str(tmp_path)}
    (scene,), _ = told(nodes, tmp_path, "who", env=without)
    assert "this machine has no token of a Ray cluster" in scene["message"]
    (scene,), _ = told(nodes, tmp_path, "who", env={**without, "RAY_AUTH_TOKEN": "0" * 64})
    assert "the cluster has another token" in scene["message"]


def test_processes_of_a_killed_driver_end(nodes, tmp_path):
    sign = tmp_path / "sign"
    with nodes.start([sys.executable, works.__file__, "wait", str(sign)], cwd=tmp_path) as driver:
        assert wait_until(sign.exists, 120)
        assert nodes.processes("ray::_Rank")
        (pid,) = [pid for pid in nodes.processes(works.__file__) if pid != driver.pid] or [driver.pid]
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not nodes.processes("ray::_Rank"), 60)


SETTINGS = {
    **TRAINING_SLICE,
    "lora.lora_dropout": 0.0,
    "lora.r": 4,
    "image.resized_height": 280,  # so large that the pictures do not fit into one batch
    "image.resized_width": 280,
    "generation.batch_size": 1,
}
CLUSTER = {"cluster.address": ADDRESS, "cluster.processes": 2, "training_args.per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def project(nodes, tmp_path_factory, base_path):
    """A project that a whole run went through, on the cluster."""
    folder = tmp_path_factory.mktemp("project")
    project = make_project(folder / "project")
    shutil.copytree(base_path("qwen2_vl"), project / "base")
    done = nodes.run(kedro_run("__default__", base_model="base", **{**SETTINGS, **CLUSTER}), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return project, done.stdout + done.stderr


def newest(project, path):
    return sorted((project / "data" / path).iterdir())[-1]


def test_a_whole_run_gives_what_one_process_gives_and_saves_it_once(nodes, project, tmp_path):
    project, said = project
    assert "train runs in 2 processes" in said
    versions = {
        path.parent.name: len(list(path.parent.iterdir())) for path in (project / "data").glob("0[678]*/*/*/*Z")
    }
    assert max(versions.values()) == 1
    (record,) = (project / "data/08_reporting/tiny/runs").glob("*/record.json")
    for node in ("encode_images", "generate_captions"):
        share = json.loads(record.read_text())["work"][node]["processes"]
        assert len(share) == 2, share
        assert all(count > 0 for count in share.values())
    alone = shutil.copytree(project, tmp_path / "alone", ignore=shutil.ignore_patterns("0[467]*", "09_workspace"))
    done = nodes.run(kedro_run("training,evaluation", base_model="base", **SETTINGS), cwd=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    weights, theirs = (
        load_file(newest(place, "06_models/tiny/adapter") / "adapter" / "adapter_model.safetensors")
        for place in (project, alone)
    )
    assert weights.keys() == theirs.keys()
    assert all(torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5) for name, value in weights.items())
    tables = [
        pd.read_csv(newest(place, "07_model_output/tiny/predictions.csv") / "predictions.csv", dtype=str)
        for place in (project, alone)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_a_signal_saves_a_checkpoint_on_all_machines_and_the_run_goes_on_from_it(nodes, project):
    project, _ = project
    long = {"training_args.num_train_epochs": 40, "training_args.save_steps": 1000}
    command = kedro_run("training", base_model="base", **{**SETTINGS, **CLUSTER, **long})
    with nodes.start(command, cwd=project) as driver:
        heard = []
        for line in driver.stdout:
            heard.append(line)
            if "Step 1 of" in line:
                driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 1, "".join(heard)
    assert "Stopped by SIGTERM after step" in " ".join("".join(heard).split())
    again = kedro_run("training", base_model="base", **{**SETTINGS, **CLUSTER, **long})
    done = nodes.run(again, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming from" in " ".join((done.stdout + done.stderr).split())


def test_a_machine_that_is_lost_while_captions_are_written_costs_its_share(nodes, project):
    project, _ = project
    pictures = {"inference.images": "data/02_intermediate/tiny/images/files"}
    settings = {**SETTINGS, **pictures}
    with nodes.start(kedro_run("inference", base_model="base", **{**settings, **CLUSTER}), cwd=project) as driver:
        assert wait_until(lambda: nodes.of_second("ray::_Worker.do") or driver.poll() is not None, 200)
        nodes.kill_second()
        said = driver.stdout.read()
        assert driver.wait(200) == 0, said
    nodes.start_second()
    assert "was lost: it was killed, or its machine is gone. Its share is repeated" in " ".join(said.split())
    table = newest(project, "07_model_output/tiny/captions.csv") / "captions.csv"
    on_the_cluster = pd.read_csv(table, dtype=str)
    shutil.rmtree(project / "data/09_workspace/tiny/inference")
    done = nodes.run(kedro_run("inference", base_model="base", **settings), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    table = newest(project, "07_model_output/tiny/captions.csv") / "captions.csv"
    pd.testing.assert_frame_equal(on_the_cluster, pd.read_csv(table, dtype=str))
    assert len(on_the_cluster) > 10
