"""One line of several rows has the loss and gradients of the rows, and FlexAttention the logits of the dense mask."""

import pytest
import torch
from torch.nn import functional

from qwen_vl_lora.exceptions import DeviceError, ParameterError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.families import QWEN2_VL, QWEN3_5
from qwen_vl_lora.model.flex_attention import FLEX, register_flex_attention
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.training.collator import RowCollator, to_device
from qwen_vl_lora.training.row_mask import RowMask, check_packing
from qwen_vl_lora.training.rows import Row, group_rows
from tiny_models import SHARING, captioned

CPU = torch.device("cpu")
CAPTIONS = ["big red circle", "a much longer caption about a small blue square on grey", "star"]


@pytest.fixture(params=SHARING)
def base(request, base_path):
    return BaseModel("tiny", base_path(request.param))


@pytest.fixture
def encoder(base, images, image_parameters):
    return ChatEncoder(base.load_processor(), image_parameters, images)


@pytest.fixture
def rows(encoder, images):
    """Rows of one to three answers, each about another picture."""
    records = [
        captioned(f"{entry.id}/{number}", entry.path, caption)
        for count, entry in enumerate(images, start=1)
        for number, caption in enumerate(CAPTIONS[:count])
    ]
    encoded = [encoder.encode(parse_conversation(record)) for record in records]
    return group_rows(encoded, "shared", 10_000)


def dense(forward):
    return {**forward.inputs, "attention_mask": forward.inputs["attention_mask"].dense()}


def summed_loss(model, inputs, forward):
    logits = model(**inputs, use_cache=False).logits[tuple(forward.source)]
    return functional.cross_entropy(logits, forward.labels, reduction="sum")


def test_rows_in_one_line_have_the_loss_and_gradients_of_each_alone(base, encoder, rows):
    model = base.load_model("float32", "cpu")
    trained = [layer.self_attn.q_proj.weight.requires_grad_(True) for layer in model.model.language_model.layers]
    packed = RowCollator(encoder, encoder.pixels, FLEX)(rows)
    assert packed.inputs["input_ids"].shape == (1, sum(row.length for row in rows))
    loss = summed_loss(model, dense(packed), packed)
    singly = [RowCollator(encoder, encoder.pixels)([row]) for row in rows]
    alone = sum(summed_loss(model, one.inputs, one) for one in singly)
    assert torch.equal(packed.labels, torch.cat([one.labels for one in singly]))
    assert torch.allclose(loss, alone, rtol=1e-5)
    both = torch.autograd.grad(loss, trained), torch.autograd.grad(alone, trained)
    for ours, theirs in zip(*both, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_logits_of_the_dense_mask(base, encoder, rows):
    packed = RowCollator(encoder, encoder.pixels, FLEX)(rows)
    plain, flex = base.load_model("float32", "cpu"), base.load_model("float32", "cpu", attention=FLEX)
    assert flex.model.language_model.config._attn_implementation == register_flex_attention()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        theirs = plain(**dense(packed), use_cache=False).logits
        ours = flex(**to_device(packed.inputs, CPU), use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_token_attends_to_its_prompt_and_its_own_answer():
    row_of = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    mask = RowMask(row_of, torch.tensor([[0, 1, 1, 2, 0, 1, 0]]))
    seen = [[key for key in range(7) if mask.dense()[0, 0, query, key]] for query in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5], [6]]


def test_where_flex_attention_cannot_train_it_is_refused(base):
    check_packing("sdpa", CPU, QWEN3_5)
    check_packing(FLEX, torch.device("cuda"), QWEN2_VL)
    with pytest.raises(DeviceError, match=r"flex_attention .* gradients on GPUs only.*Set attention: sdpa"):
        check_packing(FLEX, CPU, None)
    with pytest.raises(ParameterError, match=r"`flex_attention` .* Qwen3\.5 has layers that ignore .*sdpa"):
        check_packing(FLEX, torch.device("cuda"), QWEN3_5)


def test_a_row_of_one_answer_alone_needs_no_mask(encoder, rows):
    assert RowCollator(encoder, encoder.pixels)([Row(rows[0].members[:1])]).inputs["attention_mask"] is None
