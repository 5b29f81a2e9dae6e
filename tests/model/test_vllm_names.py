"""An adapter's tensors, by name and shape, against the layers on which vLLM takes LoRA."""

from pathlib import Path

import pytest
from safetensors import safe_open

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter
from tiny_adapters import LORA
from tiny_models import FAMILIES

VLLM = "0.33.0"
"""The version whose source the tables were read from: `model_executor/models/qwen*.py`, `lora/`."""

RENAMED = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
"""`hf_to_vllm_mapper` of all four classes, as far as an adapter has such names."""

MLP = {
    "mlp.gate_up_proj": ("hidden", {"gate_proj": "inner", "up_proj": "inner"}),
    "mlp.down_proj": ("inner", {"down_proj": "hidden"}),
}
ATTENTION = {
    "self_attn.qkv_proj": ("hidden", {"q_proj": "queries", "k_proj": "keys", "v_proj": "keys"}),
    "self_attn.o_proj": ("queries", {"o_proj": "hidden"}),
}
GATED = {
    **ATTENTION,
    "self_attn.qkv_proj": ("hidden", {"q_proj": "queries and gate", "k_proj": "keys", "v_proj": "keys"}),
}
LINEAR = {
    "linear_attn.in_proj_qkvz": ("hidden", {"in_proj_qkv": "queries, keys and values", "in_proj_z": "values"}),
    "linear_attn.in_proj_ba": ("hidden", {"in_proj_b": "heads", "in_proj_a": "heads"}),
    "linear_attn.out_proj": ("values", {"out_proj": "hidden"}),
}
LANGUAGE = {
    "qwen2_vl": [ATTENTION, ATTENTION],
    "qwen2_5_vl": [ATTENTION, ATTENTION],
    "qwen3_vl": [ATTENTION, ATTENTION, ATTENTION],
    "qwen3_5": [LINEAR, GATED],
}
"""vLLM's layers of each layer of the tiny models: the input, and the adapter's parts (`packed_modules_mapping`)."""

TOWER_ATTENTION = {"attn.qkv": ("width", {"qkv": "3 widths"}), "attn.proj": ("width", {"proj": "width"})}
BLOCK = {
    "qwen2_vl": {"mlp.fc1": ("width", {"fc1": "inner"}), "mlp.fc2": ("inner", {"fc2": "width"})},
    "qwen2_5_vl": {
        "mlp.gate_up_proj": ("width", {"gate_proj": "inner", "up_proj": "inner"}),
        "mlp.down_proj": ("inner", {"down_proj": "width"}),
    },
    "qwen3_vl": {
        "mlp.linear_fc1": ("width", {"linear_fc1": "inner"}),
        "mlp.linear_fc2": ("inner", {"linear_fc2": "width"}),
    },
}
BLOCK["qwen3_5"] = BLOCK["qwen3_vl"]
OLD_MERGER = {"mlp.0": ("4 widths", {"0": "4 widths"}), "mlp.2": ("4 widths", {"2": "hidden"})}
MERGER = {
    "linear_fc1": ("4 widths", {"linear_fc1": "4 widths"}),
    "linear_fc2": ("4 widths", {"linear_fc2": "hidden"}),
}
CONNECTOR = {
    "qwen2_vl": {"merger": OLD_MERGER},
    "qwen2_5_vl": {"merger": OLD_MERGER},
    "qwen3_vl": {"merger": MERGER, "deepstack_merger_list.0": MERGER, "deepstack_merger_list.1": MERGER},
    "qwen3_5": {"merger": MERGER},
}
"""What `get_mm_mapping` calls the connector; with the blocks, what `enable_tower_connector_lora` is for."""

CONVOLUTION = "patch_embed.proj"
"""vLLM wraps linear layers only; LoRA on this one is read and not applied, without a word."""


def sizes_of_language(text):
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    queries, keys = head * text["num_attention_heads"], head * text["num_key_value_heads"]
    sizes = {"hidden": text["hidden_size"], "inner": text["intermediate_size"], "queries": queries, "keys": keys}
    if "linear_num_value_heads" not in text:
        return sizes
    heads, values = text["linear_num_value_heads"], text["linear_num_value_heads"] * text["linear_value_head_dim"]
    mixed = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    gated = {"queries and gate": 2 * queries, "queries, keys and values": mixed, "values": values, "heads": heads}
    return {**sizes, **gated}


def sizes_of_tower(vision, hidden):
    width = vision["embed_dim"] if "embed_dim" in vision else vision["hidden_size"]
    inner = vision.get("intermediate_size", 4 * width)  # Qwen2-VL's has mlp_ratio 4 in its place
    return {"width": width, "3 widths": 3 * width, "4 widths": 4 * width, "inner": inner, "hidden": hidden}


def sites(prefix, layers, sizes):
    """Name in vLLM → shapes of A and B, for vLLM's layers below a prefix."""
    return {
        f"{prefix}.{layer.rpartition('.')[0]}{'.' if '.' in layer else ''}{part}": (
            [LORA.r, sizes[inputs]],
            [sizes[outputs], LORA.r],
        )
        for layer, (inputs, parts) in layers.items()
        for part, outputs in parts.items()
    }


def taken_by_vllm(base, vision):
    family, text = base.config["model_type"], base.config["text_config"]
    found = {}
    for number, attention in enumerate(LANGUAGE[family]):
        layers = {**attention, **MLP}
        found |= sites(f"language_model.model.layers.{number}", layers, sizes_of_language(text))
    if vision == "frozen":
        return found
    sizes = sizes_of_tower(base.config["vision_config"], text["hidden_size"])
    for number in range(base.config["vision_config"]["depth"]):
        found |= sites(f"visual.blocks.{number}", {**TOWER_ATTENTION, **BLOCK[family]}, sizes)
    for place, merger in CONNECTOR[family].items():
        found |= sites(f"visual.{place}", merger, sizes)
    return found


def adapter_in_vllms_names(folder):
    shapes = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 -- no mapping
            name = key.removeprefix("base_model.model.")
            for old, new in RENAMED.items():
                name = new + name.removeprefix(old) if name.startswith(old) else name
            module, _, matrix = name.removesuffix(".weight").rpartition(".")
            shapes.setdefault(module, {})[matrix] = file.get_slice(key).get_shape()
    return {module: (one["lora_A"], one["lora_B"]) for module, one in shapes.items()}


@pytest.mark.parametrize("vision", ["frozen", "adapted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_an_adapter_has_its_layer_in_vllm(base_path, tmp_path, family, vision):
    base = BaseModel("tiny", base_path(family))
    layers = base.geometry.projections | (base.geometry.tower if vision == "adapted" else {})
    targets = [layer for layer in layers if layer != CONVOLUTION]
    lora = LORA.model_copy(update={"target_modules": targets})
    add_adapter(base.load_model("float32", "cpu"), lora, vision, seed=0).save_pretrained(tmp_path)
    assert adapter_in_vllms_names(tmp_path) == taken_by_vllm(base, vision)


def test_the_documentation_names_the_version_that_was_read():
    export = Path(__file__).parents[2] / "docs" / "export.md"
    assert f"vLLM {VLLM}" in export.read_text(encoding="utf-8")
