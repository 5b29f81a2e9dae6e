"""Two processes train what one process would with twice the batch, and go on exactly where they were killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.processes import living, marked, wait_until
from qwen_vl_lora.exceptions import ClusterError
from qwen_vl_lora.training import fit
from qwen_vl_lora.training.loop import StepBatches
from training import two_ranks
from training.two_ranks import FAULT, Job


def weights(fitted):
    return load_file(fitted.directory / "adapter_model.safetensors")


def without_time(fitted):
    return [{name: value for name, value in row.items() if name != "samples_per_second"} for row in fitted.log]


@pytest.fixture(scope="module")
def job(tmp_path_factory, base_path):
    return Job(tmp_path_factory.mktemp("job"), base_path("qwen2_vl"))


@pytest.fixture(scope="module")
def both(job):
    """The same job by one process and by two, which note what they train on."""
    collate = StepBatches.collate

    def note(self, conversations):
        with (job.folder / "one.jsonl").open("a") as lines:
            lines.write(json.dumps([conversation.id for conversation in conversations]) + "\n")
        return collate(self, conversations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepBatches, "collate", note)
        one = job.train("one", 1, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train", two_ranks.noting)
        rows = []
        two = job.train("two", 2, 2, on_row=rows.append)
    return one, two, rows


def flat(rows):
    return [sample for row in rows for sample in row]


def test_ranks_share_each_step_of_one_process_without_overlap(both, job):
    whole = [json.loads(line) for line in (job.folder / "one.jsonl").read_text().splitlines()]
    assert [len(step) for step in whole] == [4, 4, 4, 1] * 2
    shares = [[flat(rows) for rows in step] for step in job.steps("two", 2)]
    assert [sorted(flat(step)) for step in shares] == [sorted(step) for step in whole]
    assert sorted(shares[3]) == [[], whole[3]]  # one rank has nothing to do


def test_captions_of_a_picture_share_a_row_within_one_rank(both, job):
    shared = 0
    for step in job.steps("two", 2):
        pictures = [{sample.partition("/")[0] for sample in flat(rows)} for rows in step]
        assert [len(rows) for rows in step] == [len(own) for own in pictures]
        shared += sum(len(row) > 1 for rows in step for row in rows)
    assert shared > 0


def test_two_ranks_give_the_adapter_of_one_process(both):
    one, two, _ = both
    assert (one.summary["ranks"], two.summary["ranks"]) == (1, 2)
    theirs = weights(two)
    for name, value in weights(one).items():
        assert torch.allclose(theirs[name], value, rtol=1e-3, atol=1e-5), name
    for mine, other in zip(without_time(one), without_time(two), strict=True):
        assert other == pytest.approx(mine, rel=1e-4)


def test_the_rows_of_the_log_reach_whoever_listens(both):
    _, two, rows = both
    told = {}
    for row in rows:
        told.setdefault(row["step"], {}).update(row)
    assert list(told.values()) == two.log


def test_ranks_agree_on_the_smallest_batch_size(job, monkeypatch):
    monkeypatch.setattr(fit, "train", two_ranks.disagreeing)
    fitted = job.train("auto", 2, "auto", gradient_accumulation_steps=4, max_steps=1)
    assert (fitted.directory.parent / "batch_size").read_text() == "3"


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_with_it(job, monkeypatch):
    monkeypatch.setenv(FAULT, "1:3:hangs")
    monkeypatch.setattr(fit, "train", two_ranks.faulty)
    message = r"No progress for 20 s: rank 1 \(step 3: .*\) hangs while the others wait for it"
    with pytest.raises(ClusterError, match=message):
        job.train("hanging", 2, 2, timeout=20)
    assert job.checkpoints("hanging") == ["checkpoint-2"]


@pytest.fixture(scope="module")
def undisturbed(job):
    return job.train("undisturbed", 2, 2, dropout=0.1)


@pytest.fixture(scope="module")
def stopped(job):
    """`stopped(fault, "a copy")`: how a training with this fault ended as a process of its own, which left none behind.

    Made once for each fault; its workspace is copied.
    """
    made = {}

    def run(workspace, fault):
        paths = [str(Path(two_ranks.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        with marked() as mark:
            environment = {**os.environ, FAULT: fault, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            arguments = [sys.executable, two_ranks.__file__, str(job.folder), str(job.base), workspace]
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240, check=False)
            assert wait_until(lambda: not living(mark), 10), living(mark)
        return done

    def copied(fault, workspace):
        original = fault.replace(":", "-").replace(" ", "-")
        if fault not in made:
            made[fault] = run(original, fault)
        shutil.copytree(job.folder / original, job.folder / workspace)
        return made[fault]

    return copied


@pytest.mark.parametrize(
    ("fault", "status", "message", "left"),
    [
        ("1:6:launcher killed", -signal.SIGKILL, "", "checkpoint-4"),
        pytest.param(
            *("1:6:rank killed", 1, "Rank 1 of 2 was killed by SIGKILL", "checkpoint-4"), marks=pytest.mark.slow
        ),
        ("1:5:SIGTERM", 1, "Stopped by SIGTERM after step 5 of 8. Its checkpoint is saved", "checkpoint-5"),
        pytest.param(
            *("0:5:SIGINT", 1, "Stopped by SIGINT after step 5 of 8. Its checkpoint is saved", "checkpoint-5"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_training_of_two_ranks_goes_on_to_the_same_bits(stopped, job, undisturbed, fault, status, message, left):
    workspace = f"two after {fault}"
    how = stopped(fault, workspace)
    assert how.returncode == status, how.stderr
    assert message in how.stderr
    assert job.checkpoints(workspace)[-1] == left
    fitted = job.train(workspace, 2, 2, dropout=0.1)
    assert fitted.summary["resumed_from"] == left
    assert without_time(fitted) == without_time(undisturbed)
    theirs = weights(undisturbed)
    assert all(torch.equal(theirs[name], value) for name, value in weights(fitted).items())


def test_another_number_of_ranks_is_another_training(stopped, job):
    stopped("1:6:launcher killed", "one after two")
    assert job.checkpoints("one after two")
    fitted = job.train("one after two", 1, 2, dropout=0.1)
    assert fitted.summary["resumed_from"] is None
