"""Whoever watches a training is told each row of its log, once it is there; and what decides which training it is."""

import importlib.metadata
import io
import sys
from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples import conversations
from qwen_vl_lora.training.data import TrainingData
from qwen_vl_lora.training.fit import fit_adapter
from qwen_vl_lora.training.train import MAX_POINTS, thin_curve
from samples.pictures import workspace_folder
from tiny_models import captioned

PARAMETERS = Path(__file__).parents[2] / "conf" / "base" / "parameters.yml"
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 1, "save_steps": 2, "logging_steps": 1}


@pytest.fixture
def fit(base_path, images, tmp_path):
    """`fit(on_row)`: eight steps of one picture each, validated after four."""
    tree = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
    changed = {
        "training_args": {**tree["training_args"], **TRAINING},
        "quarantine": {"max_share": 0.0},
        "vision": "adapted",  # reads pixels, so no stored features are needed
        "rows": "separate",
        "device": "cpu",
    }
    settings = validate_parameters({**tree, **changed})
    records = [captioned(f"identity_{number}", entry.path, "a star") for number, entry in enumerate(images, 1)]
    splits = conversations.Conversations(records), conversations.Conversations(records[:1])
    data = TrainingData(images, FeatureStore(tmp_path / "features"), *splits)

    def go(on_row=None, **changes):
        base_model, chosen = BaseModel("tiny", base_path("qwen2_vl")), settings.model_copy(update=changes)
        return fit_adapter(base_model, data, chosen, workspace_folder(tmp_path), on_row)

    return go


def by_step(rows):
    merged = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def test_every_row_of_the_log_is_told_as_it_is_made(fit):
    told = []
    fitted = fit(told.append)
    assert by_step(told) == fitted.log
    assert len(fitted.log) == 8
    assert [row["step"] for row in told if "validation_loss" in row] == [4, 8]
    assert fitted.summary["validation_loss"] == fitted.log[-1]["validation_loss"]


def test_a_terminal_sees_the_steps_and_both_losses(fit, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    fitted = fit()
    bars = [bar for bar in sys.stderr.getvalue().split("\r") if "/8" in bar]
    assert "| 8/8 [" in bars[-1]
    assert f"loss={fitted.log[-1]['loss']:.4f}, validation loss={fitted.log[-1]['validation_loss']:.4f}" in bars[-1]


def test_validation_loss_is_shown_while_it_trains(fit, caplog):
    caplog.set_level("INFO")
    fit()
    assert [f"Step {step} of 8: validation loss" in caplog.text for step in (4, 6, 8)] == [True, False, True]


def test_a_training_that_goes_on_tells_the_rows_before_it_too(fit):
    told = []

    def stop_at_the_sixth(row):
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stop_at_the_sixth)
    fitted = fit(told.append)
    assert fitted.summary["resumed_from"] == "checkpoint-4"
    assert by_step(told) == fitted.log
    assert [row["step"] for row in fitted.log] == list(range(1, 9))


def test_a_training_parses_no_stored_conversation_again(fit, monkeypatch):
    monkeypatch.setattr(conversations, "parse_conversation", lambda _: pytest.fail("a conversation was parsed again"))
    assert fit().summary["samples"] == 4


def test_a_training_on_features_of_another_library_is_another_one(fit, monkeypatch):
    from qwen_vl_lora.training import fit as fitting

    made = []

    def note(*parts):
        made.append(job_inputs(*parts))
        raise KeyboardInterrupt

    job_inputs = fitting.job_inputs
    monkeypatch.setattr(fitting, "job_inputs", note)
    version = importlib.metadata.version
    for pillow in ("1.0", "2.0"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, now=pillow: now if name == "pillow" else version(name)
        )
        with pytest.raises(KeyboardInterrupt):
            fit(vision="frozen")
    one, other = made
    assert one.pop("image_features") != other.pop("image_features")
    assert one == other


def test_the_curve_of_a_long_training_is_thinned_and_ends_where_it_ended():
    log = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 1001)]
    log += [{"step": step, "validation_loss": 2.0} for step in (500, 1000)]
    curve = thin_curve(log)
    assert curve[-2:] == [{"step": 500, "validation_loss": 2.0}, {"step": 1000, "validation_loss": 2.0}]
    assert len(curve) == MAX_POINTS + 2
    assert curve[-3] == {"step": 1000, "loss": 0.001}
    assert thin_curve([{"step": 1, "loss": 3.0}]) == [{"step": 1, "loss": 3.0}]
    assert thin_curve([]) == []
