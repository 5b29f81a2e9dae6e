"""A whole run, cut off from the network and among planted secrets: it needs none, and none of them is found afterwards.

Fails when a step asks the network (the kernel's answer for `unshare -n`, and a note by Python's audit events) or when
`mask_text` is taken out of runs/surroundings.py or recording.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from command_line import TRAINING_SLICE, call, kedro_run, make_project

SECRETS = {
    "HF_TOKEN": "hf_PLANTEDaaaaaaaaaaaaaaaaaaaa",
    "MODELSCOPE_API_TOKEN": "ms-PLANTEDbbbbbbbbbbbbbbbbbbbb",
    "SWANLAB_API_KEY": "PLANTEDcccccccccccccccccccc",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDdddddddddddddddddddd",
}
REMOTE = "https://somebody:tail:after@PLANTED%40eeeeeeeeeeeeeeee@example.org/project.git"
# Only named: the default source does not read it.
SOURCE = "https://reader:tail@PLANTEDffffffffffffffff@example.org/captions.csv?sig=PLANTEDgggg%2F"
NOTE_CONNECTIONS = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        if event == "socket.connect" and isinstance(arguments[1], str):
            return  # a socket of this machine alone
        with open(os.environ["CONNECTIONS"], "a") as notes:
            print(event, arguments[1:], file=notes)
sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_path):
    """The default pipeline's run, and where its connections were noted."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-n", "true"], check=False).returncode:
        pytest.skip("cutting the network needs root")
    folder = tmp_path_factory.mktemp("whole")
    project = make_project(folder / "project")
    for arguments in (["init", "-q"], ["remote", "add", "origin", REMOTE]):
        subprocess.run(["git", *arguments], cwd=project, check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=project, check=True)
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(NOTE_CONNECTIONS)
    python_path = os.pathsep.join([str(folder / "hook"), os.environ.get("PYTHONPATH", "")])
    hidden = ("HF_HUB_OFFLINE", "DO_NOT_TRACK", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {**SECRETS, "PYTHONPATH": python_path, "CONNECTIONS": str(folder / "connections")}
    command = kedro_run(
        "__default__",
        prefix=("unshare", "-n"),
        base_model=base_path("qwen2_vl"),
        captions_file=SOURCE,
        **TRAINING_SLICE,
    )
    result = call(command, project, env=environment, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return project, folder / "connections", result


def test_a_whole_run_needs_no_network_and_asks_for_none(finished):
    project, connections, _ = finished
    assert list((project / "data/08_reporting").rglob("comparison_report.html"))
    assert not connections.exists(), connections.read_text()


def test_no_secret_is_written_anywhere(finished):
    project, _, result = finished
    written = [path for path in project.rglob("*") if path.is_file() and ".git" not in path.relative_to(project).parts]
    assert any(path.name == "record.json" for path in written)
    assert any(path.name == "comparison_report.html" for path in written)
    found = [path.relative_to(project).as_posix() for path in written if b"PLANTED" in path.read_bytes()]
    assert found == []
    assert "PLANTED" not in result.stdout + result.stderr


def test_the_record_names_the_remote_without_its_token(finished):
    project, _, _ = finished
    (record,) = (project / "data/08_reporting").rglob("record.json")
    assert "https://***@example.org/project.git" in record.read_text(encoding="utf-8")
