"""A training killed anywhere goes on by the same command and ends with the same bits."""

import json
import subprocess
import time
from collections import Counter

import pandas as pd
import pytest

from command_line import TRAINING_SLICE, kedro_run, project_with_data
from faults.killing import SAVE_STEPS, seeded_faults
from qwen_vl_lora.runs.records import read_records, runs_folder


@pytest.fixture(scope="module")
def reference(killable):
    """A job, what it gives undisturbed, and how long it takes."""
    project = killable()
    began = time.monotonic()
    status, steps = project.train()
    assert status == 0
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 3 * SAVE_STEPS
    summary = json.loads(project.newest("08_reporting/tiny/training_summary.json").read_text())
    return project, project.result(), summary["seconds"], time.monotonic() - began


def kill_and_go_on(project, fault):
    """Kill one training, run it again; gives the steps that were done twice, or None when the fault never came."""
    status, before = project.train(fault)
    if status == 0:
        return None
    assert status == -9
    status, after = project.train()
    assert status == 0
    # A step is done when the next one begins: its checkpoint is part of it.
    return len(set(before[:-1]) & set(after))


def check_kills(reference, number, seed):
    project, result, seconds, _ = reference
    repeated = []
    kinds = Counter()
    for fault in seeded_faults(2 * number, seconds, seed):
        steps = kill_and_go_on(project, fault)
        assert project.result() == result, fault
        if steps is not None:
            assert steps < SAVE_STEPS, fault
            repeated.append(steps)
            kinds[fault[0]] += 1
        if len(repeated) == number:
            break
    assert len(repeated) == number
    assert kinds.keys() >= {"write", "rename", "accumulation"}
    print(f"{number} kills, seed {seed}, {dict(kinds)}; steps repeated: {dict(Counter(repeated))}")


@pytest.mark.parametrize("fault", [("accumulation", 13), ("write", 3), ("rename", 2)])
def test_a_killed_training_goes_on_to_the_same_bits(reference, fault):
    project, result, *_ = reference
    assert kill_and_go_on(project, fault) < SAVE_STEPS
    assert project.result() == result


@pytest.mark.parametrize("asked", ["sigterm", "sigint"])
def test_a_training_that_is_asked_to_stop_saves_first_and_repeats_nothing(reference, asked):
    project, result, *_ = reference
    status, before = project.train((asked, 5))
    assert status == 1
    assert before == [1, 2, 3, 4, 5]
    record = read_records(runs_folder(project.folder, "tiny"))[-1]
    assert record.outcome == "interrupted"
    name = asked.upper()
    assert f"Stopped by {name} after step 5 of" in record.facts["message"]
    status, after = project.train()
    assert (status, after[0]) == (0, 6)
    assert project.result() == result
    assert project.summary()["resumed_from"] == "checkpoint-5"


def test_sigterm_ends_the_command_with_one_message(tmp_path, tmp_path_factory, base_path):
    project = project_with_data(tmp_path_factory.getbasetemp(), tmp_path / "project")
    settings = {**TRAINING_SLICE, "training_args.num_train_epochs": 50, "swanlab.mode": "disabled"}
    command = kedro_run("training", base_model=base_path("qwen2_vl"), **settings)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=project, **pipes) as process:  # what ends a real process, its exit included
        for line in process.stdout:
            if "Step 1 of" in line:
                process.terminate()
                break
        said = " ".join(process.stdout.read().split())
    assert process.returncode == 1
    assert "Error: Stopped by SIGTERM after step" in said
    assert "the same command resumes from there" in said
    assert "Traceback" not in said


def test_a_stop_at_the_end_of_an_epoch_does_not_lose_its_validation(reference):
    project, result, *_ = reference
    half = project.summary()["steps"] // 2
    assert project.train(("sigterm", half))[0] == 1
    assert project.train()[1][0] == half + 1
    assert project.result() == result


@pytest.mark.parametrize("strategy", ["steps", pytest.param("no", marks=pytest.mark.slow)])
def test_a_stop_after_the_last_step_is_heard_and_no_step_is_trained_again(reference, killable, strategy):
    project, result, *_ = reference
    other = killable(folder=project.folder, training_args={"save_strategy": strategy})
    status, before = other.train(("sigterm_at_end", 1))
    record = read_records(runs_folder(project.folder, "tiny"))[-1]
    assert (status, record.outcome) == (1, "interrupted")
    assert f"after step {before[-1]} of {before[-1]}" in record.facts["message"]
    assert other.train() == (0, [])
    assert other.result() == result


def test_time_and_memory_of_all_parts_are_counted(reference):
    project, _, seconds, _ = reference
    project.train(("step", 8))
    project.train()
    summary = project.summary()
    assert summary["resumed_from"] == "checkpoint-6"
    assert summary["seconds"] > seconds / 10
    assert summary["samples_per_second"] < 10 * summary["samples"] * summary["epochs"] / seconds
    assert summary["peak_memory_mb"] > 50


def test_a_damaged_newest_checkpoint_falls_back_to_the_same_bits(reference):
    project, result, *_ = reference
    assert project.train(("step", 8))[0] == -9
    (newest,) = (project.folder / "data/09_workspace/tiny/training").glob("*/checkpoint-6")
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"x")
    status, after = project.train()
    assert (status, after[0]) == (0, 4)
    assert project.result() == result


def test_a_finished_training_never_resumes(reference):
    project = reference[0]
    assert project.train()[1][0] == 1
    assert not list((project.folder / "data/09_workspace/tiny/training").glob("*/checkpoint-*"))


@pytest.fixture(scope="module")
def stopping_early(killable):
    """A job that stops early and publishes its best step, what it gives undisturbed, and its summary."""
    project = killable(
        training_args={
            "num_train_epochs": 30,
            "learning_rate": 0.3,  # makes it worse soon
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "early_stopping_patience": 2,
        }
    )
    assert project.train()[0] == 0
    return project, project.result(), project.summary()


def test_training_stops_early_and_publishes_the_step_of_the_best_validation(stopping_early):
    project, _, summary = stopping_early
    log = pd.read_csv(project.newest("08_reporting/tiny/training_log.csv"))
    assert summary["best_step"] == log.loc[log["validation_loss"].idxmin(), "step"]
    assert summary["steps"] == summary["best_step"] + 2 * 2


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(("step", 5), marks=pytest.mark.slow),
        ("renamed", 2),
        ("load_best", 1),
        pytest.param(("publish", 1), marks=pytest.mark.slow),
    ],
)
def test_early_stopping_and_the_best_step_survive_a_kill(stopping_early, fault):
    project, result, summary = stopping_early
    assert kill_and_go_on(project, fault) is not None
    assert project.result() == result
    again = project.summary()
    assert (again["best_step"], again["steps"]) == (summary["best_step"], summary["steps"])


@pytest.mark.slow
def test_a_kill_at_the_end_repeats_nothing_though_one_checkpoint_is_kept(killable):
    project = killable(
        training_args={
            "eval_strategy": "steps",
            "eval_steps": SAVE_STEPS,
            "load_best_model_at_end": True,
            "learning_rate": 1e-20,  # changes weights, but no loss: the first validation stays the best
            "save_total_limit": 1,
        }
    )
    assert project.train()[0] == 0
    result, summary = project.result(), project.summary()
    assert summary["best_step"] == SAVE_STEPS < summary["steps"] - SAVE_STEPS
    assert kill_and_go_on(project, ("stage", 1)) == 0
    assert project.result() == result


def test_two_runs_at_once_in_one_data_folder_each_read_their_own(killable):
    one = killable()
    two = killable(folder=one.folder)
    two.params = {**two.params, "captions": {"num_rows": 30}}
    for project in (one, two):
        project.start(["data_engineering", "training"])
    assert [project.finish()[0] for project in (one, two)] == [0, 0]
    records = read_records(runs_folder(one.folder, "tiny"))[-2:]
    assert {record.facts["parameters"]["captions"]["num_rows"] for record in records} == {40, 30}
    for record in records:
        versions = {a["version"] for a in record.read.values() if a["version"]}
        assert versions == {record.id}
    weights = {record.written["adapter"]["content_sha256"] for record in records}
    assert len(weights) == 2


def test_two_equal_trainings_at_once_do_not_disturb_each_other(reference, killable):
    one, result, *_ = reference
    two = killable(folder=one.folder)
    for project in (one, two):
        project.start(["training"])
    assert [project.finish()[0] for project in (one, two)] == [0, 0]
    records = read_records(runs_folder(one.folder, "tiny"))[-2:]
    assert records[0].written["adapter"]["content_sha256"] == records[1].written["adapter"]["content_sha256"]
    assert one.result() == result


@pytest.mark.slow
def test_twenty_kills_give_twenty_equal_adapters(reference):
    check_kills(reference, 20, seed=6)


@pytest.mark.slow
def test_a_hundred_kills_give_a_hundred_equal_adapters(reference):
    check_kills(reference, 100, seed=60)
