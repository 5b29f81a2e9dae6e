"""Qwen3.5 (Qwen3.6 has its architecture): a Qwen3 tower without deepstack before a hybrid language model.

Most layers of the language model have linear attention with a recurrent state (Gated DeltaNet); the others have full
attention with an output gate. A recurrent layer reads all tokens before it, whatever a mask between answers says: it
obeys padding alone. The mixture-of-experts models are another family and are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vl_lora.model.families.family import Family
from qwen_vl_lora.model.families.qwen3_vl import MERGE_SIZE, PATCH_SIZE, with_tower
from qwen_vl_lora.model.geometry import Geometry, LinearAttention


def _full_layers(text: Mapping[str, Any]) -> int:
    """The number of layers with full attention, as transformers reads it from config.json."""
    if text.get("layer_types") is not None:
        return sum(kind == "full_attention" for kind in text["layer_types"])
    return int(text["num_hidden_layers"] // text.get("full_attention_interval", 4))


def _sizes(config: Mapping[str, Any]) -> Geometry:
    text = config["text_config"]
    hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    full, head = _full_layers(text), text["head_dim"]
    linear = layers - full
    queries, key_values = head * text["num_attention_heads"], head * text["num_key_value_heads"]
    heads, value_head = text["linear_num_value_heads"], text["linear_value_head_dim"]
    values = heads * value_head
    mixed = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    attention = {
        "q_proj": (full, hidden, 2 * queries),  # with the output gate
        "k_proj": (full, hidden, key_values),
        "v_proj": (full, hidden, key_values),
        "o_proj": (full, queries, hidden),
    }
    recurrence = {
        "in_proj_qkv": (linear, hidden, mixed),
        "in_proj_z": (linear, hidden, values),
        "in_proj_b": (linear, hidden, heads),
        "in_proj_a": (linear, hidden, heads),
        "out_proj": (linear, values, hidden),
    }
    mlp = {
        "gate_proj": (layers, hidden, inner),
        "up_proj": (layers, hidden, inner),
        "down_proj": (layers, inner, hidden),
    }
    norms = layers * 2 * hidden + full * 2 * head + linear * value_head
    decays, convolutions = linear * 2 * heads, linear * mixed * text["linear_conv_kernel_dim"]
    language = Geometry(
        hidden=hidden,
        layers=layers,
        queries=queries,
        key_values=key_values,
        inner=inner,
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        projections={**attention, **recurrence, **mlp},
        projections_rest=norms + decays + convolutions,
        normed=2 * hidden + queries + key_values,
        linear=LinearAttention(linear, heads, text["linear_key_head_dim"], value_head, mixed),
        unloaded=_predictor(text, queries, key_values),
    )
    return with_tower(language, config["vision_config"])


def _predictor(text: Mapping[str, Any], queries: int, key_values: int) -> int:
    """Parameters of the layers that predict further tokens (`mtp.*`), which transformers does not load."""
    hidden, layers = text["hidden_size"], text.get("mtp_num_hidden_layers", 0)
    layer = hidden * (3 * queries + 2 * key_values + 3 * text["intermediate_size"] + 2) + 2 * text["head_dim"]
    return layers * layer + hidden * (2 * hidden + 3) if layers else 0


_TOWERS = {
    "small": {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_position_embeddings": 2304},
    "medium": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_position_embeddings": 2304},
    "large": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_position_embeddings": 2304},
}


def _published(
    hidden: int, layers: int, heads: tuple[int, int, int], inner: int, *, tied: bool, tower: str
) -> dict[str, Any]:
    """Args: heads: of queries, of keys, and of the values of linear attention."""
    queries, keys, values = heads
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": 256,
        "intermediate_size": inner,
        "vocab_size": 248_320,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "linear_num_value_heads": values,
        "mtp_num_hidden_layers": 1,
    }
    return {"text_config": text, "vision_config": _TOWERS[tower], "tie_word_embeddings": tied}


_27B = _published(5120, 64, (24, 4, 48), 17_408, tied=False, tower="large")

QWEN3_5 = Family(
    name="Qwen3.5",
    model_type="qwen3_5",
    patch_size=PATCH_SIZE,
    merge_size=MERGE_SIZE,
    default_system=None,
    sizes=_sizes,
    published={
        "Qwen/Qwen3.5-0.8B": _published(1024, 24, (8, 2, 16), 3584, tied=True, tower="small"),
        "Qwen/Qwen3.5-2B": _published(2048, 24, (8, 2, 16), 6144, tied=True, tower="medium"),
        "Qwen/Qwen3.5-4B": _published(2560, 32, (16, 4, 32), 9216, tied=True, tower="medium"),
        "Qwen/Qwen3.5-9B": _published(4096, 32, (16, 4, 32), 12_288, tied=False, tower="large"),
        "Qwen/Qwen3.5-27B": _27B,
        "Qwen/Qwen3.6-27B": _27B,
    },
    answer_start="<think>\n\n</think>\n\n",
    linear_attention=("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    unquantized=("in_proj_a", "in_proj_b"),  # a row for each head: too narrow for blocks, and they decide its decay
    shares_rows=False,
)
