"""Whoever watches a training is told each row of its log, once it is there; and what decides which training it is."""

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.tuning.data import TrainingData
from qwen_vl_lora.tuning.fit import fit_adapter
from qwen_vl_lora.tuning.settings import TrainingSettings
from tiny_models import captioned

PARAMETERS = Path(__file__).parents[2] / "conf" / "base" / "parameters.yml"
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 1, "save_steps": 2, "logging_steps": 1}


@pytest.fixture
def fit(base_path, images, tmp_path):
    """`fit(on_log)`: eight steps of one picture each, validated after four."""
    tree = yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))
    parameters = validate_parameters({**tree, "training_args": {**tree["training_args"], **TRAINING}})
    settings = TrainingSettings(
        prompt=parameters.prompt,
        image=parameters.image,
        max_length=parameters.max_length,
        max_share=0.0,
        lora=parameters.lora,
        training_args=parameters.training_args,
        vision="adapted",  # reads pixels, so no stored features are needed
        rows="separate",
        resume="auto",
        device="cpu",
        attention="sdpa",
        quantization=None,
        init_adapter=None,
        generation=parameters.generation,
    )
    records = [captioned(f"identity_{number}", entry.path, "a star") for number, entry in enumerate(images, 1)]
    data = TrainingData(images, FeatureStore(tmp_path / "features"), records, records[:1])

    def go(on_log=None, **changes):
        base_model, chosen = BaseModel("tiny", base_path("qwen2_vl")), replace(settings, **changes)
        return fit_adapter(base_model, data, chosen, tmp_path / "workspace", on_log)

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


def test_one_process_trains_on_one_gpu_however_many_it_sees(fit, monkeypatch):
    from transformers import TrainingArguments

    from qwen_vl_lora.tuning import fit as fitting

    def as_on_two_gpus(**settings):
        """What transformers counts for a process without a launcher."""
        arguments = TrainingArguments(**settings)
        arguments._n_gpu = 2
        return arguments

    trained_on = fitting.train_on
    seen = []

    def look(trainer, checkpoint):
        seen.append(trainer.args.n_gpu)
        trained_on(trainer, checkpoint)

    monkeypatch.setattr(fitting, "TrainingArguments", as_on_two_gpus)
    monkeypatch.setattr(fitting, "train_on", look)
    fit()
    assert seen == [1]


def test_a_training_on_features_of_another_library_is_another_one(fit, monkeypatch):
    from qwen_vl_lora.tuning import fit as fitting

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
