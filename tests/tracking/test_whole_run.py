"""`kedro run` beside a cloud: what it sends and stores holds no secret, and no cloud keeps it from ending."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from command_line import TRAINING_SLICE, call, kedro_run, make_project
from tracking.cloud import KEY, Cloud

REMOTE = "https://somebody:ghp_PLANTEDeeeeeeeeeeeeeeee@example.org/project.git"
SOURCE = "https://reader:PLANTEDffffffffffffffff@example.org/captions.csv"  # only named: not read here


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with data, below a git remote whose address holds a token."""
    project = make_project(tmp_path_factory.mktemp("tracked") / "project")
    for arguments in (["init", "-q"], ["remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=project, check=True)
    assert call(kedro_run("data_engineering"), project).returncode == 0
    return project


@pytest.fixture
def cloud():
    cloud = Cloud()
    yield cloud
    cloud.close()


def train(project, base, cloud=None, pipelines="training", **parameters):
    environment = {**os.environ, "SWANLAB_PROJECT": "qwen"}  # as the tutorials set it
    if cloud is not None:
        environment |= {"SWANLAB_API_HOST": cloud.address, "SWANLAB_API_KEY": KEY}
        parameters = {"swanlab__mode": "online", **parameters}
    began = time.monotonic()
    command = kedro_run(pipelines, base_model=base, **TRAINING_SLICE, **parameters)
    result = call(command, project, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr, time.monotonic() - began


def test_no_secret_of_command_line_remote_or_parameters_is_stored_or_sent(project, base_path, cloud):
    named = {"captions_file": SOURCE, "swanlab__experiment_name": "of-ghp_PLANTEDaaaaaaaaaaaaaaaa"}
    said, _ = train(project, base_path("qwen2_vl"), cloud, "training,evaluation", **named)
    sent = b"".join([*cloud.received, *cloud.files.values()])
    assert cloud.run.state == "FINISHED"
    assert b"Prediction" in sent
    assert b"***" in sent
    assert b"PLANTED" not in sent
    stored = [path for path in (project / "logs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".swanlab" for path in stored)
    for path in stored:
        assert b"PLANTED" not in path.read_bytes(), path
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in said
    assert "Traceback" not in said
    (surroundings,) = (project / "logs").rglob("swanlab-metadata.json")
    assert set(json.loads(surroundings.read_text()).values()) == {2, None}  # its version, and nothing of the machine
    assert b"--params" not in sent  # no command line


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["silent", "errors", "revoked"])
def test_a_faulty_cloud_lets_the_run_end_in_time(project, base_path, cloud, fault):
    cloud.after = {"house/metrics": fault}
    _, offline = train(project, base_path("qwen2_vl"))
    said, online = train(project, base_path("qwen2_vl"), cloud)
    assert online < offline + 10
    assert "swanlab sync --id" in " ".join(said.split())
    assert "Traceback" not in said
