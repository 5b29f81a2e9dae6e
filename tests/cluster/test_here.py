"""A process is one of several only where this project's own launcher says so."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from command_line import TRAINING_SLICE, call, kedro_run, make_project
from qwen_vl_lora.cluster import here

LEFT = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "x",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "PMI_SIZE": "4",
    "MV2_COMM_WORLD_SIZE": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_USE_FSDP": "true",
}
KEPT = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "", "RANKING": "1", "MY_RANK": "1", "HF_HOME": "/x"}


@pytest.fixture
def nothing_ignored(monkeypatch):
    monkeypatch.setattr(here, "ignored_variables", [])
    monkeypatch.delenv("TORCHELASTIC_SIGNALS_TO_HANDLE", raising=False)  # torch's launcher leaves it in its own process
    for name, value in {**LEFT, **KEPT}.items():
        monkeypatch.setenv(name, value)


def test_what_another_launcher_left_is_forgotten_and_named(nothing_ignored):
    here.forget_other_launchers()
    assert (here.rank(), here.world_size()) == (0, 1)
    assert sorted(LEFT) == here.ignored_variables
    assert not LEFT.keys() & os.environ.keys()
    assert os.environ.items() >= KEPT.items()


def forget_in_a_child(answers):
    here.forget_other_launchers()
    answers.put((here.rank(), here.world_size()))


def test_a_child_process_keeps_what_its_launcher_told_it(nothing_ignored):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=forget_in_a_child, args=(answers,))
    child.start()
    assert answers.get(timeout=60) == (1, 4)
    child.join()


def test_every_door_of_the_project_forgets_them():
    script = (
        "import qwen_vl_lora.settings, os; from accelerate import PartialState; print(PartialState().num_processes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **LEFT}, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "1", done.stderr


@pytest.mark.slow
def test_a_run_in_a_clusters_environment_trains_alone_and_says_what_it_ignores(tmp_path, base_path):
    project = make_project(tmp_path / "project")
    command = kedro_run("__default__", base_model=base_path("qwen2_vl"), **TRAINING_SLICE)
    done = call(command, project, env={**os.environ, **LEFT})
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Ignored environment variables: {', '.join(sorted(LEFT))}." in " ".join(done.stdout.split())
    assert list((project / "data/06_models").rglob("adapter_model.safetensors"))
