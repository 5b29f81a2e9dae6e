"""An unfinished training goes on only where it is the very same one."""

import json
import os
import shutil
import time

import pytest

from qwen_vl_lora.exceptions import MissingArtifactError, TrainingError
from qwen_vl_lora.runs.run import begin_run, end_run
from qwen_vl_lora.runs.storage import Lock
from qwen_vl_lora.training import checkpoints
from qwen_vl_lora.training.checkpoints import LOCK_FILE, TrainingJob, find_checkpoint, seal

INPUTS = {"base_model": "abc", "lora": {"r": 8}, "data": "def"}


@pytest.fixture
def job(tmp_path):
    job = TrainingJob(INPUTS, tmp_path)
    job.open()
    return job


def add_checkpoint(job, step):
    folder = job.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    seal(folder)
    return folder


def test_without_checkpoints_training_starts_afresh(job):
    assert find_checkpoint(job, "auto") is None


def test_the_newest_checkpoint_by_step_is_taken(job):
    for step in (9, 100, 20):
        add_checkpoint(job, step)
    assert find_checkpoint(job, "auto").name == "checkpoint-100"
    assert find_checkpoint(job, "never") is None


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(job, caplog):
    add_checkpoint(job, 10)
    (add_checkpoint(job, 20) / "weights").write_text("bent")
    assert find_checkpoint(job, "auto").name == "checkpoint-10"
    assert "checkpoint-20 is damaged (weights has other bytes)" in caplog.text


def test_a_damaged_file_in_a_folder_of_a_checkpoint_is_noticed(job, caplog):
    checkpoint = add_checkpoint(job, 10)
    for rank in range(2):
        (checkpoint / "optimizer_0").mkdir(exist_ok=True)
        (checkpoint / "optimizer_0" / f"__{rank}_0.distcp").write_text(str(rank))
    seal(checkpoint)
    assert find_checkpoint(job, "auto") == checkpoint
    (checkpoint / "optimizer_0" / "__1_0.distcp").write_text("bent")
    assert find_checkpoint(job, "auto") is None
    assert "checkpoint-10 is damaged (optimizer_0/__1_0.distcp has other bytes)" in caplog.text


def test_a_checkpoint_of_transformers_trainer_is_not_resumed_and_that_is_said(job, caplog):
    older = add_checkpoint(job, 10)
    (older / "trainer_state.json").write_text("{}")
    seal(older)
    with pytest.raises(TrainingError, match="which an older version wrote. It cannot be resumed"):
        find_checkpoint(job, str(older))
    assert find_checkpoint(job, "auto") is None
    assert "checkpoint-10 was written by an older version, which is not resumed" in caplog.text


def test_another_job_starts_afresh_and_says_what_differs(job, caplog):
    add_checkpoint(job, 10)
    other = TrainingJob({**INPUTS, "lora": {"r": 4}}, job.root)
    other.open()
    with caplog.at_level("INFO"):
        assert find_checkpoint(other, "auto") is None
    assert "lora.r: 8 → 4" in caplog.text
    assert "base_model" not in caplog.text


def test_naming_a_checkpoint_of_another_job_is_an_error(job):
    checkpoint = add_checkpoint(job, 10)
    other = TrainingJob({**INPUTS, "data": "new"}, job.root)
    with pytest.raises(TrainingError, match="belongs to another run: data: def → new"):
        find_checkpoint(other, str(checkpoint))
    assert find_checkpoint(job, str(checkpoint)) == checkpoint


def test_naming_a_damaged_or_missing_checkpoint_is_an_error(job):
    checkpoint = add_checkpoint(job, 10)
    (checkpoint / "weights").unlink()
    with pytest.raises(TrainingError, match="is damaged"):
        find_checkpoint(job, str(checkpoint))
    with pytest.raises(MissingArtifactError, match="was not found"):
        find_checkpoint(job, str(job.folder / "checkpoint-99"))


def test_a_finished_job_never_resumes(job):
    add_checkpoint(job, 10)
    job.close()
    assert find_checkpoint(job, "auto") is None
    assert json.loads((job.folder / "inputs.json").read_text()) == INPUTS


def test_checkpoints_stay_until_the_run_that_trains_has_finished(job):
    for finished in (False, True):
        begin_run("r1")
        job.open()
        checkpoint = add_checkpoint(job, 10)
        job.close()
        assert checkpoint.is_dir()
        end_run(finished=finished)
        assert checkpoint.is_dir() is not finished
        shutil.rmtree(checkpoint, ignore_errors=True)


def test_an_equal_training_of_another_process_gets_its_own_folder(job, tmp_path):
    job.close()
    lock = Lock(job.folder / LOCK_FILE)
    assert lock.acquire()
    other = TrainingJob(INPUTS, tmp_path)
    other.open()
    assert other.folder.name == f"{job.folder.name}-2"
    other.close()
    lock.release()
    again = TrainingJob(INPUTS, tmp_path)
    again.open()
    assert again.folder == job.folder


def test_opening_cleans_up_what_a_kill_left(job):
    for name in (".incoming/checkpoint-3", ".checkpoint-2.0.retired", ".inputs.json.0.partial"):
        (job.folder / name).mkdir(parents=True)
    job.open()
    assert sorted(path.name for path in job.folder.iterdir()) == [".lock", "inputs.json"]


def test_never_starts_afresh_for_good(job):
    add_checkpoint(job, 10)
    find_checkpoint(job, "never")
    assert find_checkpoint(job, "auto") is None


def test_a_checkpoint_whose_best_step_is_damaged_is_not_gone_on_from(job, caplog):
    add_checkpoint(job, 5)
    best, newest = add_checkpoint(job, 10), add_checkpoint(job, 20)
    (newest / "state.json").write_text(json.dumps({"best_step": 10}))
    seal(newest)
    assert find_checkpoint(job, "auto") == newest
    (best / "weights").write_text("bent")
    assert find_checkpoint(job, "auto").name == "checkpoint-5"
    assert "its best step checkpoint-10: weights has other bytes" in caplog.text


def test_a_checkpoint_is_on_the_disk_before_it_is_visible(job, monkeypatch):
    written = job.folder / ".incoming" / "checkpoint-3"
    written.mkdir(parents=True)
    (written / "weights").write_text("w")
    events = []
    sync, replace = checkpoints.sync_tree, checkpoints.replace
    monkeypatch.setattr(checkpoints, "sync_tree", lambda path: (events.append("disk"), sync(path)))
    monkeypatch.setattr(checkpoints, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    checkpoints.publish(written, job.folder)
    assert events == ["disk", "name"]
    assert find_checkpoint(job, "auto").name == "checkpoint-3"


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3, 10]), (2, [1, 3, 10]), (1, [1, 10])])
def test_the_newest_and_the_best_checkpoints_are_kept(job, limit, left):
    for step in (1, 2, 3, 10):
        add_checkpoint(job, step)
    checkpoints.prune(job.folder, limit, 1)
    assert [path.name for path in job.checkpoints()] == [f"checkpoint-{step}" for step in left]


def test_a_checkpoint_named_elsewhere_brings_its_best_step_along(job, tmp_path):
    best, newest = add_checkpoint(job, 10), add_checkpoint(job, 20)
    (newest / "state.json").write_text(json.dumps({"best_step": 10}))
    seal(newest)
    copied = shutil.copytree(job.folder, tmp_path / "backup")
    for path in job.checkpoints():
        shutil.rmtree(path)
    assert find_checkpoint(job, str(copied / newest.name)) == copied / newest.name
    assert [path.name for path in job.checkpoints()] == [best.name]
    assert (job.folder / best.name / "weights").read_text() == "10"


def test_the_training_that_began_last_is_the_newest_though_the_clock_went_back(tmp_path):
    first = TrainingJob(INPUTS, tmp_path)
    first.open()
    later = time.time() + 10_000
    os.utime(first.folder / "inputs.json", (later, later))  # written before the clock was set back
    second = TrainingJob({**INPUTS, "data": "new"}, tmp_path)
    second.open()
    times = [(job.folder / "inputs.json").stat().st_mtime_ns for job in (first, second)]
    assert times[0] < times[1]
