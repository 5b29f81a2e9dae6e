"""An unfinished training goes on only where it is the very same one."""

import json

import pytest

from qwen_vl_lora.exceptions import MissingArtifactError, TrainingError
from qwen_vl_lora.tuning.checkpoints import TrainingJob, find_checkpoint, seal

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


def test_another_job_starts_afresh_and_says_what_differs(job, caplog):
    add_checkpoint(job, 10)
    other = TrainingJob({**INPUTS, "lora": {"r": 4}}, job.root)
    other.open()
    with caplog.at_level("INFO"):
        assert find_checkpoint(other, "auto") is None
    assert "lora: {'r': 8} → {'r': 4}" in caplog.text
    assert "base_model" not in caplog.text


def test_naming_a_checkpoint_of_another_job_is_an_error(job):
    checkpoint = add_checkpoint(job, 10)
    other = TrainingJob({**INPUTS, "data": "new"}, job.root)
    with pytest.raises(TrainingError, match="this run is another one: data: def → new"):
        find_checkpoint(other, str(checkpoint))
    assert find_checkpoint(job, str(checkpoint)) == checkpoint


def test_naming_a_damaged_or_missing_checkpoint_is_an_error(job):
    checkpoint = add_checkpoint(job, 10)
    (checkpoint / "weights").unlink()
    with pytest.raises(TrainingError, match="is damaged"):
        find_checkpoint(job, str(checkpoint))
    with pytest.raises(MissingArtifactError, match="is not there"):
        find_checkpoint(job, str(job.folder / "checkpoint-99"))


def test_a_finished_job_never_resumes(job):
    add_checkpoint(job, 10)
    job.close()
    assert find_checkpoint(job, "auto") is None
    assert json.loads((job.folder / "inputs.json").read_text()) == INPUTS
