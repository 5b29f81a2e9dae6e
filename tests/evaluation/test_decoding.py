"""Rows leave a batch, tokens are written in place, and what prompts begin with is computed once."""

import pytest
import torch

from qwen_vl_lora.evaluation import decoding
from qwen_vl_lora.evaluation.decoding import Decoder, keeps_all_tokens
from qwen_vl_lora.model.base_model import BaseModel
from tiny_models import SHARING

BEGINNING = [5, 9, 7]
RESTS = [[11, 12, 13, 14], [21, 22], [31], [41, 42, 43], [51, 52]]


@pytest.fixture(params=SHARING)
def model(request, base_path):
    return BaseModel("tiny", base_path(request.param)).load_model("float32", "cpu").eval()


def padded(rests, shared):
    width = max(map(len, rests))
    ids = torch.tensor([[*BEGINNING, *[0] * (width - len(rest)), *rest] for rest in rests])
    mask = (ids != 0).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, shared


def plain(model, rest, most):
    """The likeliest tokens after a prompt, each from the whole text anew."""
    ids = [*BEGINNING, *rest]
    with torch.inference_mode():
        for _ in range(most):
            places = torch.arange(len(ids)).expand(3, 1, -1)
            ids.append(int(model(input_ids=torch.tensor([ids]), position_ids=places).logits[0, -1].argmax()))
    return ids[len(BEGINNING) + len(rest) :]


@pytest.mark.parametrize("shared", [0, 3])
def test_rows_write_what_they_write_alone_whatever_leaves(model, shared, monkeypatch):
    monkeypatch.setattr(decoding, "_ROOM", 2)  # is outgrown
    alone = [plain(model, rest, 9) for rest in RESTS]
    ends = {alone[0][1], alone[1][2]}
    expected = [ids[: next((n for n, one in enumerate(ids, 1) if one in ends), 9)] for ids in alone]
    shapes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: shapes.append(tuple(given["input_ids"].shape)) or forward(**given)
    )
    decoder = Decoder(model, list(ends), 9, 1.0)
    for _ in range(2):  # the second batch begins like the first
        assert dict(decoder.answers(*padded(RESTS, shared))) == dict(enumerate(expected))
    assert shapes.count((1, len(BEGINNING))) == (shared == len(BEGINNING))
    assert min(rows for rows, tokens in shapes if tokens == 1) < len(RESTS)
    assert keeps_all_tokens(model)


def test_a_base_with_linear_attention_keeps_more_than_tokens(base_path):
    assert not keeps_all_tokens(BaseModel("tiny", base_path("qwen3_5")).load_structure())
