"""Quantization reaches the language model's layers alone, and a missing bitsandbytes is named."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

from qwen_vl_lora.exceptions import BaseModelError, DeviceError
from qwen_vl_lora.model import base_model
from qwen_vl_lora.model.base_model import BaseModel, check_quantization
from tiny_models import FAMILIES

bitsandbytes = pytest.importorskip("bitsandbytes")
SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_only_the_language_models_projections_are_quantized(base_path, family, name, kind):
    base = BaseModel("tiny", base_path(family))
    plain, quantized = base.load_model("float32", "cpu"), base.load_model("float32", "cpu", quantization=name)
    changed = [name for name, module in quantized.named_modules() if type(module).__name__ == kind]
    compressed = {end: count for end, (count, _, _) in base.geometry.projections.items()}
    for end in base.family.unquantized:
        del compressed[end]
    assert Counter(name.rpartition(".")[2] for name in changed) == compressed
    assert all(".language_model.layers." in name for name in changed)
    for (name, ours), (_, theirs) in zip(
        plain.model.visual.named_parameters(), quantized.model.visual.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = plain(input_ids=ids).logits, quantized(input_ids=ids).logits
    assert 0 < (ours - theirs).norm() < 0.5 * ours.norm()


def test_captions_come_from_the_weights_that_are_trained():
    """Of layers of any width, such as the shipped base's 160, on CPUs of any kind."""
    model = BaseModel("shipped", SHIPPED).load_model("float32", "cpu", quantization="nf4")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        generating = model(input_ids=ids).logits
        assert torch.equal(model.train()(input_ids=ids).logits, generating)


def test_a_library_that_quantizes_the_tower_too_is_refused(base_path, monkeypatch):
    own = base_model.quantization_config

    def config_that_keeps_less(*arguments):
        config = own(*arguments)
        config.llm_int8_skip_modules = ["lm_head"]
        return config

    monkeypatch.setattr(base_model, "quantization_config", config_that_keeps_less)
    with pytest.raises(BaseModelError, match=r"reached \d+ layers, 1\d of them in the vision tower"):
        BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu", quantization="nf4")


def test_a_missing_bitsandbytes_is_named_with_how_to_get_it(monkeypatch):
    check_quantization("nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_quantization(None)
    with pytest.raises(DeviceError, match=r"nf4 needs bitsandbytes, which is not installed.*qlora"):
        check_quantization("nf4")
