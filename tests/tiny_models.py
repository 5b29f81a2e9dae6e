"""Random models of all families with two or three layers, built from their configs, and pictures to show them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.tiny.tiny_model import SPECIAL_TOKENS

HIDDEN = 64
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
SHARING = FAMILIES[:3]
"""The families whose layers all obey a mask between answers."""

_QWEN3_TOWER = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": HIDDEN,
}
_VISION = {
    "qwen2_vl": {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": HIDDEN},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {**_QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]},
    "qwen3_5": _QWEN3_TOWER,
}
_WIDTH_OF_FEATURES = {"qwen2_vl": "hidden_size"} | dict.fromkeys(FAMILIES[1:], "out_hidden_size")
_TEXT = {
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {"head_dim": 32, "num_hidden_layers": 3},  # what the last layer adds to pictures, no answer sees
    "qwen3_5": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "partial_rotary_factor": 0.5,
        },
    },
}
_CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
}

THINKING_TEMPLATE = """\
{%- set last = namespace(question=0) -%}
{%- for message in messages if message['role'] == 'user' -%}{%- set last.question = last.question + 1 -%}{%- endfor -%}
{%- set asked = namespace(questions=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set asked.questions = asked.questions + 1 -%}{%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- set text -%}
        {%- for part in message['content'] -%}
            {{- '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] -}}
        {%- endfor -%}
    {%- endset -%}
    {%- if message['role'] == 'assistant' and asked.questions == last.question -%}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in text else '' -%}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- text.split('</think>')[-1] | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n<think>\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
"""What Qwen3.5's template does with thoughts: only answers after the last question keep a think block."""


def save_tiny_base(folder: Path, processor, family: str, *, tied: bool = True, **text) -> Path:
    """A random model of `family` with `processor`, as a directory that loads like a real one.

    Args:
        text: keys of the language model's config in place of the tiny ones.
    """
    config_class, model_class = _CLASSES[family]
    processor = _processor_of(family, processor)
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = config_class(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            **_TEXT[family],
            **text,
        },
        vision_config={**_VISION[family], _WIDTH_OF_FEATURES[family]: text.get("hidden_size", HIDDEN)},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():  # the default 0.02 leaves logits so flat that a wrong mask would hardly show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _processor_of(family: str, processor):
    """The tiny base's processor, or one of the newer families with its tokenizer."""
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return processor
    without_system = processor.chat_template.replace("if loop.first and", "if false and")
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        processor.tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=without_system if family == "qwen3_vl" else THINKING_TEMPLATE,
    )


def random_picture(width: int, height: int, seed: int) -> bytes:
    """PNG bytes of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def store_pictures(root: Path, sizes: list[tuple[int, int]]) -> ImageStore:
    """An image store with one noise picture of each (width, height)."""
    return store_bytes(root, {f"picture_{n}": random_picture(*size, n) for n, size in enumerate(sizes)})


def store_bytes(root: Path, pictures: dict[str, bytes]) -> ImageStore:
    """An image store of PNG bytes by id."""
    files = root / "files"
    files.mkdir(parents=True)
    entries = []
    for identity, content in pictures.items():
        width, height = Image.open(io.BytesIO(content)).size
        partial = files / "partial"
        partial.write_bytes(content)
        sha256 = file_sha256(partial)
        partial.rename(files / f"{sha256}.png")
        entries.append(ImageEntry(identity, sha256, "data/files", ".png", width, height, len(content)))
    return ImageStore(files, entries, {})


def captioned(identity: str, path: str, caption: str, prompt: str = "Describe this picture.") -> dict:
    """A conversation in its stored form: one picture, one prompt, one caption."""
    return {
        "id": identity,
        "conversations": [
            {"from": "user", "value": f"{prompt} <|vision_start|>{path}<|vision_end|>"},
            {"from": "assistant", "value": caption},
        ],
    }
