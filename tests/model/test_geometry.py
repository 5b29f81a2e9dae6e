"""A model's sizes follow from its config.json, to the last parameter."""

import json

import pytest

from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import QWEN2_VL, family_of_published
from qwen_vl_lora.model.fingerprints import stored_tensors
from tiny_models import FAMILIES


def stored_parameters(base):
    sizes = [tensor.shape for path in base.weight_files for tensor in stored_tensors(path)]
    return sum(_product(shape) for shape in sizes)


def _product(shape):
    total = 1
    for side in shape:
        total *= side
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_parameters_of_a_config_are_those_of_its_weights(base_path, family, tied):
    base = BaseModel("tiny", base_path(family, tied=tied))
    assert base.geometry.parameters == stored_parameters(base)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # half of `total_size` in each checkpoint's model.safetensors.index.json, or the hub's number of parameters
        ("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600),
        ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("Qwen/Qwen3-VL-32B-Instruct", 33_357_390_064),
        ("Qwen/Qwen3.5-0.8B", 873_438_784),
        ("Qwen/Qwen3.5-2B", 2_274_069_824),
        ("Qwen/Qwen3.5-4B", 4_659_865_088),
        ("Qwen/Qwen3.5-9B", 9_653_104_368),
        ("Qwen/Qwen3.6-27B", 27_781_427_952),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(name, parameters):
    geometry = family_of_published(name).published_geometry(name)
    assert geometry.parameters + geometry.unloaded == parameters


def test_the_flat_form_of_published_checkpoints_is_read_as_todays(base_path):
    config = json.loads((base_path("qwen2_vl") / "config.json").read_text(encoding="utf-8"))
    flat = {**config, **config.pop("text_config"), "model_type": "qwen2_vl", "tie_word_embeddings": True}
    del flat["text_config"]
    assert QWEN2_VL.geometry(flat) == BaseModel("tiny", base_path("qwen2_vl")).geometry


def test_a_missing_size_is_named():
    with pytest.raises(BaseModelError, match="config.json lacks 'num_attention_heads'"):
        QWEN2_VL.geometry({"model_type": "qwen2_vl", "vision_config": {}})
