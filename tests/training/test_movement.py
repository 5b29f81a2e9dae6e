"""A training whose adapter, or a part of it, did not move publishes nothing."""

import pytest
import torch

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.parameters import LoraParameters
from qwen_vl_lora.training.movement import Movement


@pytest.fixture
def model(base_path):
    lora = LoraParameters(
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        bias="lora_only",
        target_modules=["q_proj", "o_proj"],
        use_rslora=False,
        use_dora=False,
        modules_to_save=["lm_head"],
    )
    return add_adapter(BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu"), lora, "frozen", 0)


def move(model, leave_out=()):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not any(part in name for part in leave_out):
                parameter.add_(0.1)


def test_an_adapter_that_moved_everywhere_passes(model):
    movement = Movement(model)
    move(model)
    assert movement.check(model, None, 1e-3) == {}


def test_a_factor_that_stayed_zero_is_an_error_that_names_its_module(model):
    movement = Movement(model)
    move(model, leave_out=["1.self_attn.o_proj.lora_B"])
    with pytest.raises(
        TrainingError, match=r"1 of 5 adapted modules did not change .*layers\.1\.self_attn\.o_proj\. No"
    ):
        movement.check(model, None, 1e-3)


def test_a_whole_module_that_stayed_is_an_error_that_names_it(model):
    movement = Movement(model)
    move(model, leave_out=["lm_head"])
    with pytest.raises(TrainingError, match="adapted modules did not change in training: lm_head"):
        movement.check(model, None, 1e-3)


def test_weights_put_together_from_shards_are_looked_at_in_place_of_the_models(model):
    movement = Movement(model)
    weights = {name: value + 0.1 for name, value in model.named_parameters() if value.requires_grad}
    assert movement.check(model, weights, 1e-3) == {}


def test_steps_at_rate_zero_alone_are_said_in_the_summary(model, caplog):
    movement = Movement(model)
    assert "learning rate was 0 at every step" in movement.check(model, None, 0.0)["warning"]
    assert "learning rate was 0 at every step" in caplog.text
    with pytest.raises(TrainingError, match="5 of 5 adapted modules did not change"):
        movement.check(model, None, 1e-3)


def test_a_rate_too_low_to_change_what_got_a_gradient_is_said_in_the_summary(model, caplog):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    movement = Movement(model)
    reached = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    told = movement.check(model, None, 1e-30, reached)["warning"]
    assert told.startswith("The learning rate (1e-30 at most) was too low to change 5 of 5 adapted modules")
    assert told in caplog.text
    without_one = {name for name in reached if "lm_head" not in name}
    with pytest.raises(TrainingError, match="5 of 5 adapted modules did not change"):
        movement.check(model, None, 1e-30, without_one)
