"""A family states what the rest of the code asks, and its statements are those of transformers' own model."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.inputs import blanked, choose_pictures
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model import families
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.stand_in import StandInProcessor
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.training.collator import RowCollator
from qwen_vl_lora.training.rows import Row
from tiny_models import FAMILIES, captioned

LAYERS = (torch.nn.Linear, torch.nn.Conv3d)


@pytest.mark.parametrize(("family", "side", "grid"), [("qwen2_vl", 28, (1, 4, 10)), ("qwen3_vl", 32, (1, 4, 8))])
def test_pictures_have_the_tokens_of_their_family(base_path, images, image_parameters, family, side, grid):
    base = BaseModel("tiny", base_path(family))
    sizer = ChatEncoder(base.load_processor(), image_parameters, images).sizer
    assert sizer.token_side == base.family.token_side == side
    assert sizer.grid(128, 64) == grid


@pytest.mark.parametrize(("family", "levels"), [("qwen2_vl", 1), ("qwen3_vl", 3), ("qwen3_5", 1)])
def test_all_levels_of_a_picture_are_stored_and_blanked(base_path, images, image_parameters, tmp_path, family, levels):
    base = BaseModel("tiny", base_path(family))
    encoder = ChatEncoder(base.load_processor(), image_parameters, images)
    sizer = encoder.sizer
    store, cpu = FeatureStore(tmp_path / "store"), torch.device("cpu")
    store.publish(encode_pictures(images, base, image_parameters, "float32", cpu, store, tmp_path / "staging"))
    stored = choose_pictures("frozen", base, encoder, store, "float32")
    entry = next(iter(images))
    shape = (sizer.num_tokens(sizer.grid(entry.width, entry.height)), 64)
    assert base.geometry.feature_levels == levels
    assert stored.features.get(entry.sha256).shape == (shape if levels == 1 else (levels, *shape))
    key = FeatureKey.of(base, image_parameters.size, "float32")
    assert key.format == (1 if levels == 1 else 2)

    (conversation,) = Conversations([captioned("a", entry.path, "star")])
    inputs = RowCollator(encoder, stored)([Row((encoder.encode(conversation),))]).inputs
    blank = blanked(inputs)["mm_encoder_outputs"]["image"]
    pooled, deep = blank.pooler_output, getattr(blank, "deepstack_features", ())
    assert len(deep) == levels - 1
    assert not torch.cat([*pooled, *(part for level in deep for part in level)]).any()


def test_deepstack_alone_shows_the_model_a_picture(base_path, images, image_parameters):
    """So a check that blanked the pooled features only would find that pictures reach the model where they do not."""
    base = BaseModel("tiny", base_path("qwen3_vl"))
    family, model = base.family, base.load_model("float32", "cpu")
    tokens = model.config.image_token_id
    inputs = {"input_ids": torch.tensor([[tokens, tokens, 5, 6]]), "position_ids": torch.arange(4).expand(3, 1, 4)}
    stacked = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    levels = stacked.clone()
    levels[0] = 0
    seen, deep, blank = (
        model(**inputs, mm_encoder_outputs={"image": family.tower_output([features])}).logits
        for features in (stacked, levels, torch.zeros_like(stacked))
    )
    assert (deep - blank).abs().max() > 0.01
    assert (seen - deep).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "written"),
    [
        (families.QWEN2_VL, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{asked}"),
        (families.QWEN3_VL, "{asked}"),
        (families.QWEN3_5, "{asked}<think>\n\n</think>\n\n"),
    ],
)
def test_the_stand_in_for_a_processor_writes_as_the_familys_own(family, written):
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}
    processor = StandInProcessor(family)
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n"
    prompt = written.format(asked=f"{user}<|im_start|>assistant\n")
    assert processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True) == prompt
    whole = processor.apply_chat_template([question, answer], tokenize=False, add_generation_prompt=False)
    assert whole == f"{prompt}A dog.<|im_end|>\n"
    assert processor.image_processor.patch_size == family.patch_size


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_a_geometry_are_those_of_the_model_that_lora_can_adapt(base_path, family):
    base = BaseModel("tiny", base_path(family))
    geometry, model = base.geometry, base.load_structure()
    parts = {base.family.tower_of(model): geometry.tower, base.family.language_model_of(model): geometry.projections}
    for part, expected in parts.items():
        layers = {name: layer for name, layer in part.named_modules() if isinstance(layer, LAYERS)}
        for end, (count, inputs, outputs) in expected.items():
            found = [layers.pop(name) for name in list(layers) if f".{name}".endswith(f".{end}")]
            assert [tuple(layer.weight.flatten(1).shape) for layer in found] == [(outputs, inputs)] * count
        assert not layers


@pytest.mark.parametrize(
    "config", [{"model_type": "llava"}, SimpleNamespace(model_type="qwen3_vl_moe"), {"model_type": "qwen3_5_moe"}, {}]
)
def test_an_unknown_family_is_refused_by_name(config):
    supported = "qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5"
    with pytest.raises(
        BaseModelError, match=rf"is of family '(llava|qwen3_vl_moe|qwen3_5_moe|None)'; supported: {supported}\."
    ):
        families.family_of(config)


def test_families_are_known_without_torch():
    code = "import sys, qwen_vl_lora.model.families; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
