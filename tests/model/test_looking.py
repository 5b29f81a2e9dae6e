"""A Qwen3-VL that learned to look at pooled features and deepstack loses what it reads from each when it is blank."""

import pytest
import torch
from torch.nn import functional

from qwen_vl_lora.features.inputs import blanked
from qwen_vl_lora.model.base_model import BaseModel

PICTURES, TOKENS = 3, 4
PAIRS = [(first, second) for first in range(PICTURES) for second in range(PICTURES)]
"""Pictures that give the pooled features and the deepstack levels: each names one word of the caption."""


@pytest.fixture(scope="module")
def base(base_path):
    return BaseModel("tiny", base_path("qwen3_vl"))


@pytest.fixture(scope="module")
def features(base):
    """(levels, TOKENS, hidden) of each picture, as they are stored."""
    tower, grid = base.load_vision_tower("float32", "cpu"), torch.tensor([[1, 4, 4]])
    pixels = torch.randn(PICTURES, 16, 3 * 2 * 16**2, generator=torch.Generator().manual_seed(0))
    return [base.family.stored_features(tower(picture, grid_thw=grid)) for picture in pixels]


def asked(base, features):
    """Pictures with pooled features of the first and deepstack of the second of each pair, and a first word."""
    image, begin = base.config["image_token_id"], 7
    mixed = [torch.cat([features[first][:1], features[second][1:]]) for first, second in PAIRS]
    return {
        "input_ids": torch.tensor([[*[image] * TOKENS, begin]] * len(PAIRS)),
        "position_ids": torch.arange(TOKENS + 1).expand(3, len(PAIRS), TOKENS + 1),
        "mm_encoder_outputs": {"image": base.family.tower_output(mixed)},
    }


def words(model, inputs):
    """The two words that follow, one from each half of the vocabulary."""
    logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, 0]
    return logits[:, 10 : 10 + PICTURES], logits[:, 20 : 20 + PICTURES]


def right(model, inputs):
    """How many pictures are named by pooled features and by deepstack."""
    with torch.no_grad():
        named = [one.argmax(-1).tolist() for one in words(model, inputs)]
    return tuple(sum(pair[side] == word for pair, word in zip(PAIRS, named[side], strict=True)) for side in (0, 1))


def without(inputs, part):
    output = inputs["mm_encoder_outputs"]["image"]
    blank = blanked(inputs)["mm_encoder_outputs"]["image"]
    return {**inputs, "mm_encoder_outputs": {"image": type(output)(**{**output, part: blank[part]})}}


def test_what_was_learned_from_each_level_is_lost_when_it_is_blank(base, features):
    model, inputs = base.load_model("float32", "cpu").requires_grad_(True), asked(base, features)
    base.family.drop_tower(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    wanted = [torch.tensor(side) for side in zip(*PAIRS, strict=True)]
    for _ in range(150):
        loss = sum(functional.cross_entropy(one, word) for one, word in zip(words(model, inputs), wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    everything, none = len(PAIRS), len(PAIRS) // PICTURES
    assert right(model, inputs) == (everything, everything)
    assert right(model, blanked(inputs)) == (none, none)
    # Each on its own: the word that it gave is lost, and so is every caption, which has both words.
    assert right(model, without(inputs, "pooler_output"))[0] <= none
    assert right(model, without(inputs, "deepstack_features"))[1] <= none
