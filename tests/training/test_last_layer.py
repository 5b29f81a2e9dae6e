"""The last layer computes what the loss reads, and nothing else."""

import pytest
import torch

from qwen_vl_lora.features.inputs import choose_pictures
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.training.collator import RowCollator, silenced
from qwen_vl_lora.training.last_layer import LastLayer
from qwen_vl_lora.training.rows import plan_passes
from tiny_models import captioned


@pytest.fixture
def forward(base_path, images, image_parameters):
    """The model, its last layer, and a pass of two captions of one picture and one of another."""
    base = BaseModel("tiny", base_path("qwen2_vl"))
    encoder = ChatEncoder(base.load_processor(), image_parameters, images)
    collate = RowCollator(encoder, choose_pictures("adapted", base, encoder, None, "float32"))
    one, two, *_ = [entry.path for entry in images]
    records = [captioned("0", one, "a star"), captioned("1", one, "a blue star"), captioned("2", two, "red")]
    encoded = [encoder.encode(parse_conversation(record)) for record in records]
    (rows,) = plan_passes(encoded, "shared", 4)
    model = base.load_model("float32", "cpu")
    base.family.language_model_of(model).requires_grad_(True)
    return base, model, collate(rows)


def test_only_scored_positions_pass_the_last_mlp_and_its_gradients_are_those_of_all(forward):
    base, model, batch = forward
    language_model = base.family.language_model_of(model)
    whole = model(**batch.inputs, use_cache=False).logits[tuple(batch.source)]
    last = LastLayer(model, base.family)
    seen = []
    for layer in language_model.layers:
        layer.mlp.register_forward_hook(lambda _mlp, inputs, _output: seen.append(inputs[0].shape[:-1].numel()))
    short = last.scored_logits(model, batch.inputs, batch.source)
    *others, scored = seen
    assert set(others) == {batch.inputs["input_ids"].numel()}
    assert scored == torch.unique(batch.source, dim=1).shape[1] < others[0]
    assert torch.allclose(short, whole, atol=1e-6)
    assert torch.equal(model(**batch.inputs, use_cache=False).logits[tuple(batch.source)], whole)
    weights = list(language_model.parameters())
    for mine, all_of_it in zip(
        torch.autograd.grad(short.logsumexp(-1).sum(), weights, retain_graph=True),
        torch.autograd.grad(whole.logsumexp(-1).sum(), weights),
        strict=True,
    ):
        assert torch.allclose(mine, all_of_it, rtol=1e-4, atol=1e-6)


def test_a_pass_without_scored_tokens_gives_gradients_of_zero(forward):
    base, model, batch = forward
    nothing = silenced(batch)
    last = LastLayer(model, base.family)
    logits = last.scored_logits(model, nothing.inputs, nothing.source)
    assert logits.shape[0] == 0
    logits.sum().backward()
    given = [weight.grad for weight in base.family.language_model_of(model).layers.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in given)


def test_after_an_error_in_a_pass_the_layer_is_whole_again(forward):
    base, model, batch = forward
    whole = model(**batch.inputs, use_cache=False).logits
    last = LastLayer(model, base.family)
    with pytest.raises(TypeError):
        last.scored_logits(model, {**batch.inputs, "no_such_input": 1, "use_cache": False}, batch.source)
    assert torch.equal(model(**batch.inputs, use_cache=False).logits, whole)
