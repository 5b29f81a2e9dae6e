"""Qwen2.5-VL: a vision tower with window attention and a gated MLP before Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen_vl_lora.model.families.family import Family
from qwen_vl_lora.model.families.qwen2_vl import (
    DEFAULT_SYSTEM,
    MERGE_SIZE,
    PATCH_SIZE,
    language_sizes,
    patch_values,
)
from qwen_vl_lora.model.geometry import Geometry


def _sizes(config: Mapping[str, Any]) -> Geometry:
    language, vision = language_sizes(config), config.get("vision_config", {})
    width, depth, inner = vision["hidden_size"], vision["depth"], vision["intermediate_size"]
    merged = width * vision.get("spatial_merge_size", MERGE_SIZE) ** 2
    tower = {  # the MLP's names are the language model's own: without an exclusion LoRA's usual list reaches them
        "attn.qkv": (depth, width, 3 * width),
        "attn.proj": (depth, width, width),
        "mlp.gate_proj": (depth, width, inner),
        "mlp.up_proj": (depth, width, inner),
        "mlp.down_proj": (depth, inner, width),
        "merger.mlp.0": (1, merged, merged),
        "merger.mlp.2": (1, merged, language.hidden),
    }
    biases = sum(count * outputs for count, _, outputs in tower.values())
    rms_norms = (2 * depth + 1) * width
    tower["patch_embed.proj"] = (1, patch_values(vision), width)
    return replace(language, tower=tower, tower_rest=biases + rms_norms)


QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    model_type="qwen2_5_vl",
    patch_size=PATCH_SIZE,
    merge_size=MERGE_SIZE,
    default_system=DEFAULT_SYSTEM,
    sizes=_sizes,
    published={
        "Qwen/Qwen2.5-VL-3B-Instruct": {
            "hidden_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "intermediate_size": 11_008,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1280, "depth": 32, "intermediate_size": 3420},
        },
        "Qwen/Qwen2.5-VL-7B-Instruct": {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
            "tie_word_embeddings": False,
            "vision_config": {"hidden_size": 1280, "depth": 32, "intermediate_size": 3420},
        },
    },
)
