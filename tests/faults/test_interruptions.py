"""A run that is told to end says so in its record, wherever it is, and the same command goes on afterwards."""

import functools
import signal
import subprocess

import pytest

from command_line import TRAINING_SLICE, call, kedro_run, project_with_data, start
from qwen_vl_lora.runs.records import read_records, runs_folder

SETTINGS = {**TRAINING_SLICE, "swanlab.mode": "disabled"}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with data."""
    return project_with_data(tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("interrupted") / "project")


@pytest.mark.parametrize(
    ("node", "by", "message"),
    [
        ("encode_images", signal.SIGTERM, "Stopped by SIGTERM. What was saved stays"),
        slow("train_adapter", signal.SIGTERM, "Stopped by SIGTERM"),  # before its first step
        slow("generate_captions", signal.SIGTERM, "Stopped by SIGTERM. What was saved stays"),
        ("generate_captions", signal.SIGINT, "The process ended before the run did"),
    ],
)
def test_a_stop_outside_of_training_steps_is_recorded_as_interrupted(project, base_path, node, by, message):
    command = kedro_run("training,evaluation", base_model=base_path("qwen2_vl"), **SETTINGS)
    with start(command, project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if f"{node}: " in line:
                process.send_signal(by)
                break
        else:
            pytest.fail(f"{node} never ran")
        said = " ".join(process.stdout.read().split())
    assert process.returncode == (130 if by == signal.SIGINT else 1)
    assert "Traceback" not in said
    record = read_records(runs_folder(project, "tiny"))[-1]
    assert record.facts["outcome"] == "interrupted"
    assert record.facts["message"].startswith(message) or f": {message}" in record.facts["message"]
    assert record.facts["ended"] > record.facts["started"]
    assert "predictions" not in record.written


def test_the_same_command_finishes_afterwards(project, base_path):
    command = kedro_run("training,evaluation", base_model=base_path("qwen2_vl"), **SETTINGS)
    assert call(command, project).returncode == 0
    assert read_records(runs_folder(project, "tiny"))[-1].outcome == "finished"
