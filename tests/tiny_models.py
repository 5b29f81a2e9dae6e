"""Random two-layer models of both families, built from their configs, and pictures to show them."""

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
)

from qwen_vl_lora.modeling.fingerprints import file_sha256
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.scenes.tiny_model import SPECIAL_TOKENS

HIDDEN = 64
FAMILIES = ("qwen2_vl", "qwen2_5_vl")

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
}
_CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}


def save_tiny_base(folder: Path, processor, family: str, *, tied: bool = True) -> Path:
    """A random model of `family` with `processor`, as a directory that loads like a real one."""
    config_class, model_class = _CLASSES[family]
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = config_class(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config=_VISION[family],
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


def random_picture(width: int, height: int, seed: int) -> bytes:
    """PNG bytes of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def store_pictures(root: Path, sizes: list[tuple[int, int]]) -> ImageStore:
    """An image store with one noise picture of each (width, height)."""
    files = root / "files"
    files.mkdir(parents=True)
    entries = []
    for number, (width, height) in enumerate(sizes):
        partial = files / "partial"
        partial.write_bytes(random_picture(width, height, number))
        sha256, size = file_sha256(partial), partial.stat().st_size
        partial.rename(files / f"{sha256}.png")
        entries.append(ImageEntry(f"picture_{number}", sha256, "data/files", ".png", width, height, size))
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
