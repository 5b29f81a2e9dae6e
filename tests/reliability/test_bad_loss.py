"""A loss or a gradient that is no number stops training before it can spoil the weights or a checkpoint."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from pipelines.conftest import fresh_run, newest, once, project, run  # noqa: F401  fixtures
from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.training.loop import TrainingLoop


def spoil(monkeypatch, from_step, change):
    """Change the loss of every step from this one on."""
    summed = TrainingLoop.summed_loss

    def spoiled(self, forward):
        loss = summed(self, forward)
        return change(loss, self.adapted) if self.state.step + 1 >= from_step else loss

    monkeypatch.setattr(TrainingLoop, "summed_loss", spoiled)


def poison_the_gradient(loss, model):
    """Adds 0, whose derivative is 0 · ∞: the loss stays a number and the gradient does not."""
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    return loss + (weight * 0).sum().sqrt()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda loss, model: loss * float("nan"), "The loss became nan", id="NaN"),
        pytest.param(lambda loss, model: loss * float("inf"), "The loss became inf", id="infinite"),
        pytest.param(poison_the_gradient, "The gradient's norm became nan", id="gradient"),
    ],
)
def test_step_samples_and_last_good_checkpoint_are_named(run, project, newest, monkeypatch, change, said):  # noqa: F811
    run("data_engineering")
    spoil(monkeypatch, 4, change)
    with pytest.raises(TrainingError) as stopped:
        run("training", training_args={"save_steps": 1, "save_total_limit": None})
    message = str(stopped.value)
    assert message.startswith(f"{said} at step 4 on samples identity_")
    assert "Last good checkpoint: checkpoint-3 in " in message
    known = {one["id"] for one in json.loads(newest("05_model_input/tiny/train_conversations.json").read_text())}
    samples = re.findall(r"identity_\d+", message)
    assert len(samples) == 4
    assert set(samples) <= known
    for checkpoint in (project / "data/09_workspace").rglob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values()), checkpoint.name
    assert not (project / "data/06_models").exists()


def test_the_last_checkpoint_is_the_one_with_the_highest_step(run, project, monkeypatch):  # noqa: F811
    """By name, checkpoint-9 would come after checkpoint-10."""
    run("data_engineering")
    spoil(monkeypatch, 11, lambda loss, model: loss * float("nan"))
    with pytest.raises(TrainingError, match="at step 11 .*Last good checkpoint: checkpoint-10 in"):
        run("training", training_args={"save_steps": 1, "save_total_limit": None, "num_train_epochs": 2})
