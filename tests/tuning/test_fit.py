"""Whoever watches a training is told each row of its log, once it is there."""

from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.tuning.fit import TrainingData, fit_adapter
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

    def go(on_log=None):
        return fit_adapter(BaseModel("tiny", base_path("qwen2_vl")), data, settings, tmp_path / "workspace", on_log)

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
