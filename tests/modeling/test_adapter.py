"""An adapter says what made it, fits what it was trained for, and is refused where it would silently do nothing."""

import json

import pytest
from safetensors.torch import load_file, save_file

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.modeling.adapter import RECORD_FILE, Adapter, note_run
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.lora import add_adapter
from qwen_vl_lora.parameters import LoraParameters, PromptParameters

PROMPT = PromptParameters(user="Describe this picture.", system=None, override=False)
LORA = LoraParameters(
    r=2, lora_alpha=4, lora_dropout=0.0, bias="none", target_modules=["q_proj"], use_rslora=False, use_dora=False
)


@pytest.fixture
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl"))


@pytest.fixture
def adapter(tmp_path, base, image_parameters):
    """As this project writes it: weights, configuration and record."""
    add_adapter(base.load_model("float32", "cpu"), LORA, "frozen", seed=0).save_pretrained(tmp_path)
    record = {
        "base_model": {"fingerprint": base.fingerprint, "name": "data/06_models/tiny"},
        "vision": "frozen",
        "prompt": PROMPT.model_dump(),
        "image": image_parameters.model_dump(),
    }
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    return Adapter(tmp_path)


def edit_weights(adapter, change):
    path = adapter.path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_an_adapter_fits_what_it_was_trained_for(adapter, base, image_parameters):
    adapter.check_base(base)
    adapter.check_settings(PROMPT, image_parameters, "frozen", None)


def test_another_base_is_refused_and_the_right_one_named(adapter, base_path):
    with pytest.raises(AdapterError, match=r"trained with .*configured .*\(other\).*base_model=data/06_models/tiny"):
        adapter.check_base(BaseModel("other", base_path("qwen2_5_vl")))


def test_every_other_setting_is_named(adapter, image_parameters):
    prompt = PROMPT.model_copy(update={"user": "Another question"})
    image = image_parameters.model_copy(update={"max_pixels": 112 * 112})
    with pytest.raises(
        AdapterError, match=r"prompt: .*Another question.*image: .*12544.*vision: .*adapted.*quantization: .*nf4"
    ) as refused:
        adapter.check_settings(prompt, image, "adapted", "nf4")
    assert "scoring.settings_from=adapter" in str(refused.value)


def test_limits_on_files_may_differ(adapter, image_parameters):
    adapter.check_settings(PROMPT, image_parameters.model_copy(update={"max_source_pixels": 5}), "frozen", None)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(MissingArtifactError, match=f"has no {RECORD_FILE}"):
        _ = Adapter(tmp_path).record


def test_a_damaged_record_is_named(adapter):
    (adapter.path / RECORD_FILE).write_text("{")
    with pytest.raises(AdapterError, match=f"{RECORD_FILE} is no JSON"):
        _ = Adapter(adapter.path).record


def test_the_run_is_added_to_the_record(adapter):
    note_run(adapter.path, {"id": "run 1"})
    record = Adapter(adapter.path).record
    assert record["run"] == {"id": "run 1"}
    assert record["prompt"] == PROMPT.model_dump()


def test_weights_that_were_cut_short_are_refused(adapter, base):
    path = adapter.path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cannot be loaded: .*damaged or belong to another base"):
        adapter.attach(base.load_model("float32", "cpu"))


def test_weights_that_find_no_place_are_refused(adapter, base):
    """PEFT only warns, and the adapter would do nothing."""
    edit_weights(adapter, lambda weights: {name.replace("layers", "blocks"): value for name, value in weights.items()})
    with pytest.raises(AdapterError, match="missing adapter keys"):
        adapter.attach(base.load_model("float32", "cpu"))


def test_weights_of_another_shape_are_refused(adapter, base):
    edit_weights(adapter, lambda weights: {name: value[:, :1].contiguous() for name, value in weights.items()})
    with pytest.raises(AdapterError, match="size mismatch"):
        adapter.attach(base.load_model("float32", "cpu"))
