"""A pickle planted in a checkpoint is not run when training goes on.

The seal stops whoever cannot write it anew; `weights_only` stops the others. To see the tests
fail, make `_fault` in training/checkpoints.py return None, or wrap `torch.load` so that `weights_only` is False. Of
training_args.bin, which is never loaded, there is no defence to take away.
"""

from __future__ import annotations

import pickle

import pytest

from qwen_vl_lora.training.checkpoints import seal
from qwen_vl_lora.training.loop import TrainingLoop

PICKLES = ("optimizer.pt", "random_numbers-0.pt")


@pytest.fixture
def interrupted(run, once, project, monkeypatch):
    """A training that was stopped after its first checkpoint; the checkpoint's folder."""
    step = TrainingLoop.compute_gradients

    def stop_at_the_third(self, *arguments):
        if self.state.step == 2:
            raise KeyboardInterrupt
        return step(self, *arguments)

    def make():
        run("data_engineering")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainingLoop, "compute_gradients", stop_at_the_third)
            run("training")

    once("interrupted", make)
    (checkpoint,) = (project / "data/09_workspace").rglob("checkpoint-2")
    assert {name for name in PICKLES if (checkpoint / name).is_file()} == set(PICKLES)
    return checkpoint


def test_a_planted_pickle_breaks_the_seal_and_training_starts_afresh(interrupted, run, malicious_pickle, trace, caplog):
    for name in PICKLES:
        malicious_pickle(interrupted / name)
    run("training")
    assert "is damaged" in caplog.text
    assert not trace.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_a_planted_pickle_under_a_new_seal_is_refused_unread(interrupted, run, malicious_pickle, trace, name):
    malicious_pickle(interrupted / name)
    (interrupted / "files.json").unlink()
    seal(interrupted)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run("training")
    assert not trace.exists()


def test_stored_arguments_are_never_loaded(interrupted, run, malicious_pickle, trace):
    malicious_pickle(interrupted / "training_args.bin")
    (interrupted / "files.json").unlink()
    seal(interrupted)
    run("training")
    assert not trace.exists()
