"""Qwen3-VL: a vision tower whose inner levels also reach the language model (deepstack), before Qwen3.

The mixture-of-experts models are another family and are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.model.families.family import Family
from qwen_vl_lora.model.geometry import Geometry, usual_projections

if TYPE_CHECKING:
    import torch

PATCH_SIZE, MERGE_SIZE = 16, 2


def with_tower(language: Geometry, vision: Mapping[str, Any]) -> Geometry:
    """The sizes of a language model together with those of a Qwen3 tower.

    The tower has a learned grid of positions, and a further merger for each level of `deepstack_visual_indexes`.
    """
    width, depth, inner = vision["hidden_size"], vision["depth"], vision["intermediate_size"]
    patch = (
        3 * 2 * vision.get("patch_size", PATCH_SIZE) ** 2
    )  # colours x frames (a still picture counts twice) x pixels
    merged = width * vision.get("spatial_merge_size", MERGE_SIZE) ** 2
    levels = len(vision.get("deepstack_visual_indexes", ()))
    mergers = ["merger", *(f"deepstack_merger_list.{level}" for level in range(levels))]
    tower = {
        "patch_embed.proj": (1, patch, width),
        "attn.qkv": (depth, width, 3 * width),
        "attn.proj": (depth, width, width),
        "mlp.linear_fc1": (depth, width, inner),
        "mlp.linear_fc2": (depth, inner, width),
        **{f"{merger}.linear_fc1": (1, merged, merged) for merger in mergers},
        **{f"{merger}.linear_fc2": (1, merged, language.hidden) for merger in mergers},
    }
    positions = vision["num_position_embeddings"] * width
    biases = sum(count * outputs for count, _, outputs in tower.values())
    layer_norms = 2 * ((2 * depth + 1) * width + levels * merged)
    rest = positions + biases + layer_norms
    return replace(language, tower=tower, tower_rest=rest, feature_levels=1 + levels)


def _sizes(config: Mapping[str, Any]) -> Geometry:
    text = config["text_config"]
    hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    queries = text["head_dim"] * text["num_attention_heads"]
    key_values = text["head_dim"] * text["num_key_value_heads"]
    language = Geometry(
        hidden=hidden,
        layers=layers,
        queries=queries,
        key_values=key_values,
        inner=inner,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        projections=usual_projections(layers, hidden, queries, key_values, inner),
        projections_rest=layers * (2 * hidden + 2 * text["head_dim"]),
        normed=2 * hidden + queries + key_values,
    )
    return with_tower(language, config["vision_config"])


def stacked_features(output: Any) -> torch.Tensor:
    """The tower's output as (1 + deepstack levels, image tokens, hidden): the pooled features first."""
    import torch

    return torch.stack([output.pooler_output, *output.deepstack_features])


def deepstack_output(features: Sequence[torch.Tensor]) -> Any:
    """The tower's output, rebuilt from `stacked_features` of each picture."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    pooled, *levels = zip(*features, strict=True)
    return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=tuple(levels))


_SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
_LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _published(
    hidden: int, layers: int, heads: int, inner: int, *, tied: bool, tower: Mapping[str, Any]
) -> dict[str, Any]:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": inner,
        "vocab_size": 151_936,
    }
    return {"text_config": text, "vision_config": tower, "tie_word_embeddings": tied}


QWEN3_VL = Family(
    name="Qwen3-VL",
    model_type="qwen3_vl",
    patch_size=PATCH_SIZE,
    merge_size=MERGE_SIZE,
    default_system=None,
    sizes=_sizes,
    published={
        "Qwen/Qwen3-VL-2B-Instruct": _published(2048, 28, 16, 6144, tied=True, tower=_SMALL_TOWER),
        "Qwen/Qwen3-VL-4B-Instruct": _published(2560, 36, 32, 9728, tied=True, tower=_SMALL_TOWER),
        "Qwen/Qwen3-VL-8B-Instruct": _published(4096, 36, 32, 12_288, tied=False, tower=_LARGE_TOWER),
        "Qwen/Qwen3-VL-32B-Instruct": _published(5120, 64, 64, 25_600, tied=False, tower=_LARGE_TOWER),
    },
    stored_features=stacked_features,
    tower_output=deepstack_output,
)
