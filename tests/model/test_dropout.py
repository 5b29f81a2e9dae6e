"""Dropout from a seeded bit stream is dropout, and follows from torch's state alone."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.dropout import SeededDropout
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.parameters import LoraParameters

ONES = torch.ones(1000, 999)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p):
    torch.manual_seed(0)
    dropped = SeededDropout(p)(ONES)
    deviation = (p * (1 - p) / ONES.numel()) ** 0.5
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=5 * deviation + 1 / 65536)
    assert float(dropped.mean()) == pytest.approx(1, abs=5 * deviation / (1 - p))
    assert len(dropped.unique()) == 2


def test_neighbours_in_a_mask_are_independent():
    torch.manual_seed(0)
    kept = (SeededDropout(0.5)(ONES) != 0).flatten()
    for distance in (1, 2, 3, 4, 999):
        together = float((kept[distance:] & kept[:-distance]).float().mean())
        assert together == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / ONES.numel()) ** 0.5)


def test_masks_follow_from_the_state_of_torch_and_no_two_are_alike():
    dropout = SeededDropout(0.3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = dropout(ONES), dropout(ONES)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(dropout(ONES), first)
    assert torch.equal(dropout(ONES), second)


def test_gradients_pass_through_the_same_mask_also_where_activations_are_recomputed():
    dropout = SeededDropout(0.3)
    for run in (lambda x: dropout(x), lambda x: checkpoint(dropout, x, use_reentrant=False)):
        torch.manual_seed(2)
        x = ONES.clone().requires_grad_()
        output = run(x)
        output.sum().backward()
        assert torch.equal(x.grad, output.detach())


def test_nothing_is_dropped_at_0_or_in_evaluation_and_everything_at_1():
    assert SeededDropout(0.0)(ONES) is ONES
    assert SeededDropout(0.4).eval()(ONES) is ONES
    assert not SeededDropout(1.0)(ONES).any()


def test_a_fresh_adapter_has_it_on_every_projection(base_path):
    lora = LoraParameters(
        r=4, lora_alpha=8, lora_dropout=0.1, bias="none", target_modules=["q_proj", "v_proj"], use_rslora=False,
        use_dora=False,
    )  # fmt: skip
    model = add_adapter(BaseModel("tiny", base_path("qwen2_vl")).load_model("float32", "cpu"), lora, "frozen", 0)
    dropouts = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert len(dropouts) == 4
    assert all(type(dropout) is SeededDropout and dropout.p == 0.1 for dropout in dropouts)
