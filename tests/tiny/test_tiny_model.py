"""The tiny base is a true Qwen2-VL: classes, tokens, chat format, preprocessing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from qwen_vl_lora.tiny.tiny_model import SPECIAL_TOKENS, TinySizes, build_model, build_processor


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return build_processor(seed=0)


@pytest.fixture(scope="module")
def model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    return build_model(TinySizes(), processor.tokenizer, seed=0).eval()


def test_it_has_one_to_three_million_parameters(model: Qwen2VLForConditionalGeneration) -> None:
    assert 1_000_000 < model.num_parameters() < 3_000_000


def test_special_tokens_are_qwen2_vls_in_its_order(processor: Qwen2VLProcessor) -> None:
    ids = processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(ids[0], ids[0] + len(SPECIAL_TOKENS)))
    assert len(processor.tokenizer) == ids[-1] + 1
    assert (processor.tokenizer.eos_token, processor.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_model_and_tokenizer_agree_on_special_tokens(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor
) -> None:
    number = processor.tokenizer.convert_tokens_to_ids
    assert model.config.image_token_id == number("<|image_pad|>")
    assert model.config.vision_start_token_id == number("<|vision_start|>")
    assert model.generation_config.eos_token_id == [number("<|im_end|>"), number("<|endoftext|>")]
    assert model.generation_config.pad_token_id == number("<|endoftext|>")
    assert model.generation_config.repetition_penalty == 1.0


@pytest.mark.parametrize(
    "text", ["big red circle, on grey", "COCO Yes:", "请描述这张图片的内容。", "naïve 🙂\n\tÅ 123", ""]
)
def test_every_text_survives_the_vocabulary(processor: Qwen2VLProcessor, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("word", ["big", " small", " orange", " diamond", " teal", " above", " background"])
def test_words_of_the_scenes_are_single_tokens(processor: Qwen2VLProcessor, word: str) -> None:
    assert len(processor.tokenizer(word)["input_ids"]) == 1


def test_chat_format_is_qwen2_vls(processor: Qwen2VLProcessor) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Describe both."}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Two pictures."}]},
        {"role": "user", "content": "Thanks."},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Describe both.<|im_end|>\n"
        "<|im_start|>assistant\nTwo pictures.<|im_end|>\n"
        "<|im_start|>user\nThanks.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_own_system_turn_replaces_the_default(processor: Qwen2VLProcessor) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    )


def test_pictures_can_be_numbered(processor: Qwen2VLProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]}]
    assert processor.apply_chat_template(messages, add_vision_id=True).endswith(
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|>?<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("size", "num_tokens"),
    [((112, 112), 16), ((280, 280), 100), ((56, 112), 8)],
)
def test_pictures_whose_sides_are_multiples_of_28_keep_their_size(
    processor: Qwen2VLProcessor, size: tuple[int, int], num_tokens: int
) -> None:
    inputs = processor(text=["<|image_pad|>"], images=[Image.new("RGB", size)], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, size[1] // 14, size[0] // 14]]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == num_tokens


def test_stored_model_and_processor_come_back_through_the_auto_classes(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded_model) is Qwen2VLForConditionalGeneration
    assert type(loaded_processor) is Qwen2VLProcessor
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "你好 Describe."}]}
    question = processor.apply_chat_template([message])
    assert loaded_processor.apply_chat_template([message]) == question
    picture = Image.new("RGB", (112, 112), (200, 30, 30))
    before = processor(text=[question], images=[picture], return_tensors="pt")
    after = loaded_processor(text=[question], images=[picture], return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(model(**before).logits, loaded_model(**after).logits)


def test_same_seed_builds_the_same_parts(model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor) -> None:
    again = build_processor(seed=0)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    twin = build_model(TinySizes(), again.tokenizer, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
