"""The memory estimate counts what is trained, and says what to set otherwise."""

from dataclasses import replace

import pytest
import torch

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import QWEN2_VL
from qwen_vl_lora.model.lora import add_adapter, trainable_parameters
from qwen_vl_lora.parameters import LoraParameters, validate_parameters
from qwen_vl_lora.training.memory import Change, MemoryModel, PassShape, changes
from samples.pictures import PARAMETERS
from tiny_models import FAMILIES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PASS = PassShape(tokens=560, scored=60, kept=68, masked=False)
TWO_BILLION = QWEN2_VL.published_geometry("Qwen/Qwen2-VL-2B-Instruct")


def lora(**changes):
    plain = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none", "target_modules": TARGETS}
    return LoraParameters(**{**plain, "use_rslora": False, "use_dora": False, **changes})


def memory_of(geometry, lora, *, vision="frozen", quantization=None, **training_args):
    settings = validate_parameters(PARAMETERS)
    training = settings.training_args.model_copy(update=training_args)
    changes = {"lora": lora, "vision": vision, "quantization": quantization, "training_args": training}
    return MemoryModel.of(geometry, settings.model_copy(update=changes))


def model(**changes):
    return memory_of(TWO_BILLION, lora(), **{"bf16": True, "gradient_checkpointing": True, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("vision", "targets"),
    [
        ("frozen", TARGETS),
        ("frozen", ["q_proj", "down_proj"]),
        ("adapted", [*TARGETS, "qkv", "attn.proj", "merger"]),
        ("adapted", ["mlp.gate_proj", "self_attn.q_proj", "proj"]),
    ],
)
def test_loras_parameters_are_those_that_peft_trains(base_path, family, vision, targets):
    base = BaseModel("tiny", base_path(family))
    merger = "mlp.0" if "merger.mlp.0" in base.geometry.tower else "linear_fc1"
    targets = [merger if name == "merger" else name for name in targets]
    tuned = add_adapter(base.load_model("float32", "cpu"), lora(r=4, target_modules=targets), vision, 0)
    estimate = memory_of(base.geometry, lora(r=4, target_modules=targets), vision=vision)
    assert estimate.lora_parameters == trainable_parameters(tuned)


def test_the_tutorials_adapter_of_the_2b_model_has_the_size_they_print():
    assert model().lora_parameters == 73_859_072


def test_quantized_weights_are_counted_as_bitsandbytes_stores_them(base_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(256, 256)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    full, quantized = model(), model(quantization="nf4")
    projections = TWO_BILLION.projection_parameters
    per_weight = (quantized.weights - (full.weights - 2 * projections)) / projections
    assert per_weight == pytest.approx(stored / weight.numel(), rel=0.01)


def test_every_saving_saves():
    plain = model(gradient_checkpointing=False)
    assert model().peak(PASS) < plain.peak(PASS)
    assert model(quantization="nf4").peak(PASS) < model(quantization="int8").peak(PASS) < model().peak(PASS)
    assert plain.peak(PASS) < model(gradient_checkpointing=False, bf16=False).peak(PASS)
    assert plain.peak(replace(PASS, tokens=140, scored=15, kept=17)) < plain.peak(PASS)
    assert plain.peak(PASS) < plain.peak(replace(PASS, masked=True))


def test_a_tower_that_is_let_go_still_had_to_be_loaded():
    tower = 2 * TWO_BILLION.vision_parameters
    assert model(vision="adapted").weights - model().weights == tower
    little = PassShape(tokens=1, scored=1, kept=1, masked=False)
    assert model(quantization="nf4").peak(little) >= model(quantization="nf4").weights + tower
    large = replace(PASS, tokens=8000)
    assert model(vision="adapted").peak(large) == model().peak(large) + tower


def test_what_could_be_changed_keeps_the_optimizer_step():
    def shape_of(size):
        return PassShape(tokens=140 * size, scored=15 * size, kept=17 * size, masked=False)

    found = changes(model(gradient_checkpointing=False), shape_of, batch_size=4, per_step=16)
    assert [change.setting for change in found] == [
        "training_args.gradient_checkpointing: true",
        "training_args.per_device_train_batch_size: 2, gradient_accumulation_steps: 8",
        "training_args.per_device_train_batch_size: 1, gradient_accumulation_steps: 16",
        "quantization: nf4",
        "all of these",
    ]
    assert min(found, key=lambda change: change.bytes).setting == "all of these"
    assert changes(model(quantization="nf4"), shape_of, batch_size=1, per_step=1) == []
    assert isinstance(found[0], Change)
