"""Qwen2-VL: a vision tower with full attention before Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qwen_vl_lora.model.families.family import Family
from qwen_vl_lora.model.geometry import Geometry, usual_projections

PATCH_SIZE, MERGE_SIZE = 14, 2
DEFAULT_SYSTEM = "You are a helpful assistant."


def language_sizes(config: Mapping[str, Any]) -> Geometry:
    """The sizes of Qwen2, without a tower. Queries, keys and values have biases."""
    text = config.get("text_config") or config
    heads = text["num_attention_heads"]
    hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    key_values = hidden // heads * text["num_key_value_heads"]
    return Geometry(
        hidden=hidden,
        layers=layers,
        queries=hidden,
        key_values=key_values,
        inner=inner,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        projections=usual_projections(layers, hidden, hidden, key_values, inner),
        projections_rest=layers * (hidden + 2 * key_values + 2 * hidden),
        normed=2 * hidden,
    )


def patch_values(vision: Mapping[str, Any]) -> int:
    """Numbers of one patch: colours x frames (a still picture counts twice) x its pixels."""
    return 3 * 2 * int(vision.get("patch_size", PATCH_SIZE)) ** 2


def _sizes(config: Mapping[str, Any]) -> Geometry:
    language, vision = language_sizes(config), config.get("vision_config", {})
    width, depth = vision["embed_dim"], vision["depth"]
    inner = int(width * vision.get("mlp_ratio", 4))
    merged = width * vision.get("spatial_merge_size", MERGE_SIZE) ** 2
    tower = {
        "attn.qkv": (depth, width, 3 * width),
        "attn.proj": (depth, width, width),
        "mlp.fc1": (depth, width, inner),
        "mlp.fc2": (depth, inner, width),
        "merger.mlp.0": (1, merged, merged),
        "merger.mlp.2": (1, merged, language.hidden),
    }
    biases = sum(count * outputs for count, _, outputs in tower.values())
    layer_norms = (2 * depth + 1) * 2 * width
    tower["patch_embed.proj"] = (1, patch_values(vision), width)
    return replace(language, tower=tower, tower_rest=biases + layer_norms)


QWEN2_VL = Family(
    name="Qwen2-VL",
    model_type="qwen2_vl",
    patch_size=PATCH_SIZE,
    merge_size=MERGE_SIZE,
    default_system=DEFAULT_SYSTEM,
    sizes=_sizes,
    published={
        "Qwen/Qwen2-VL-2B-Instruct": {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151_936,
            "tie_word_embeddings": True,
            "vision_config": {"embed_dim": 1280, "depth": 32},
        },
        "Qwen/Qwen2-VL-7B-Instruct": {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18_944,
            "vocab_size": 152_064,
            "tie_word_embeddings": False,
            "vision_config": {"embed_dim": 1280, "depth": 32},
        },
    },
)
