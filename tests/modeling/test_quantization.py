"""Quantization reaches the language model's layers alone, and a missing bitsandbytes is named."""

import importlib.util

import pytest
import torch

from qwen_vl_lora.exceptions import BaseModelError, DeviceError
from qwen_vl_lora.modeling import quantization
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.quantization import check_quantization
from tiny_models import FAMILIES

bitsandbytes = pytest.importorskip("bitsandbytes")
PROJECTIONS = 2 * 7
"""Two layers, seven projections each."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_only_the_language_models_projections_are_quantized(base_path, family, name, kind):
    base = BaseModel("tiny", base_path(family))
    plain, quantized = base.load_model("float32", "cpu"), base.load_model("float32", "cpu", quantization=name)
    changed = [name for name, module in quantized.named_modules() if type(module).__name__ == kind]
    assert len(changed) == PROJECTIONS
    assert all(".language_model.layers." in name for name in changed)
    for (name, ours), (_, theirs) in zip(
        plain.model.visual.named_parameters(), quantized.model.visual.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = plain(input_ids=ids).logits, quantized(input_ids=ids).logits
    assert 0 < (ours - theirs).norm() < 0.5 * ours.norm()


def test_a_library_that_quantizes_the_tower_too_is_refused(base_path, monkeypatch):
    monkeypatch.setattr(quantization, "_KEPT", ["lm_head"])
    with pytest.raises(BaseModelError, match=r"reached \d+ layers, 1\d of them in the vision tower"):
        BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu", quantization="nf4")


def test_a_missing_bitsandbytes_is_named_with_how_to_get_it(monkeypatch):
    check_quantization("nf4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_quantization(None)
    with pytest.raises(DeviceError, match=r"nf4 needs bitsandbytes, which is not installed.*qlora"):
        check_quantization("nf4")
