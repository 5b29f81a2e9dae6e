"""A model whose transformers has no `mm_encoder_outputs` sees stored features all the same."""

import pytest
import torch

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.tower_outputs import ARGUMENT, accept_tower_outputs
from tiny_models import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_an_older_model_computes_from_stored_features_what_a_newer_one_does(base_path, name):
    base = BaseModel("tiny", base_path(name))
    family, model = base.family, base.load_model("float32", "cpu")
    image, levels = model.config.image_token_id, base.geometry.feature_levels
    shape = (2, 64) if levels == 1 else (levels, 2, 64)
    features = family.tower_output([torch.randn(shape, generator=torch.Generator().manual_seed(0))])
    inputs = {"input_ids": torch.tensor([[image, image, 5, 6]]), "position_ids": torch.arange(4).expand(3, 1, 4)}
    seen = model(**inputs, mm_encoder_outputs={"image": features}).logits
    unseen = model(**inputs).logits

    inner = family.above_tower_of(model)
    plain = inner.forward

    def forward(*args, **given):
        """As older ones have it: what it does not know is ignored."""
        given.pop(ARGUMENT, None)
        return plain(*args, **given)

    inner.forward = forward
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, unseen)
    accept_tower_outputs(inner)
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, seen)
    assert torch.equal(model(**inputs).logits, unseen)
    assert not torch.equal(seen, unseen)


def test_a_model_that_has_the_argument_is_left_alone(base_path):
    base = BaseModel("tiny", base_path("qwen2_vl"))
    assert not base.family.above_tower_of(base.load_model("float32", "cpu"))._forward_pre_hooks
