"""LoRA stays where it was asked to be."""

import pytest
import torch

from qwen_vl_lora.exceptions import ParameterError, TrainingError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter, check_vision_is_untouched
from qwen_vl_lora.parameters import LoraParameters
from tiny_models import FAMILIES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(**changes):
    plain = {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGETS,
        "use_rslora": False,
        "use_dora": False,
    }
    return LoraParameters(**{**plain, **changes})


def adapted_modules(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_is_untouched_although_its_layers_have_the_same_names(base_path, family):
    base = BaseModel("tiny", base_path(family))
    model = add_adapter(base.load_model("float32", "cpu"), lora(), "frozen", 0)
    assert len(adapted_modules(model)) == sum(base.geometry.projections[name][0] for name in TARGETS)
    assert not any(".visual." in name for name in adapted_modules(model))
    assert list(model.peft_config["default"].target_modules) != []


def test_an_adapted_tower_is_reached_on_2_5_as_the_tutorials_reach_it(base_path):
    base = BaseModel("tiny", base_path("qwen2_5_vl"))
    model = add_adapter(base.load_model("float32", "cpu"), lora(), "adapted", 0)
    assert sum(".visual." in name for name in adapted_modules(model)) == 2 * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_tower_is_what_plain_peft_makes_of_the_tutorials_list(base_path, family):
    from peft import LoraConfig, TaskType, get_peft_model

    base = BaseModel("tiny", base_path(family))
    tutorial = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=TARGETS, r=4, lora_alpha=8, lora_dropout=0.0)
    theirs = get_peft_model(base.load_model("float32", "cpu"), tutorial)
    ours = add_adapter(base.load_model("float32", "cpu"), lora(), "adapted", 0)
    shapes = [
        {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
        for model in (theirs, ours)
    ]
    assert shapes[0] == shapes[1]


def test_the_seed_decides_the_initial_weights(base_path):
    def first_weight(seed):
        model = BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu")
        model = add_adapter(model, lora(), "frozen", seed)
        return next(value for name, value in model.named_parameters() if ".lora_A" in name)

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_a_trainable_vision_parameter_is_refused(base_path):
    model = add_adapter(BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu"), lora(), "frozen", 0)
    next(value for name, value in model.named_parameters() if ".visual." in name).requires_grad_(True)
    with pytest.raises(TrainingError, match=r"1 parameters of the vision tower.*visual"):
        check_vision_is_untouched(model, "frozen")


def test_modules_that_are_not_there_are_refused(base_path):
    model = BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu")
    with pytest.raises(ParameterError, match=r"lora.target_modules: .nothing_like_it. matches no module"):
        add_adapter(model, lora(target_modules=["nothing_like_it"]), "frozen", 0)
