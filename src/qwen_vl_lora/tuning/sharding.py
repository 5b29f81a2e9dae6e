"""FSDP, by transformers' own key: where it runs, what it cuts, and the adapter put together again from the shards."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.parameters import TrainingParameters
from qwen_vl_lora.ranks import here


def check_sharding(training_args: TrainingParameters, device: torch.device, ranks: int) -> None:
    """Refuse FSDP where it would be left aside without a word, or where nobody has seen it train rightly.

    Raises:
        DeviceError: on a CPU, in one process, and in float16.
    """
    if not training_args.is_sharded:
        return
    remedy = "Set training_args.fsdp: false"
    if device.type == "cpu":
        raise DeviceError(f"training_args.fsdp shards weights among GPUs, and this run is on a CPU. {remedy}.")
    if ranks == 1:
        raise DeviceError(
            f"training_args.fsdp shards weights among processes, and there is one. {remedy}, or raise "
            "launcher.nproc_per_node or launcher.nnodes."
        )
    if training_args.fp16:
        raise DeviceError(
            "training_args.fsdp was never tried in float16, whose scaler would have to agree over all shards. "
            f"{remedy}, or train in bf16 on a GPU that has it."
        )


def sharding_arguments(model: Any, training_args: TrainingParameters) -> dict[str, Any]:
    """What TrainingArguments need beyond the user's own: the layers to cut, without those of a dropped tower."""
    if not training_args.is_sharded:
        return {}
    present = {type(module).__name__ for module in model.modules()}
    layers = sorted(present.intersection(model.get_base_model()._no_split_modules))
    return {"fsdp_config": {"transformer_layer_cls_to_wrap": layers}}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, of which ranks may hold parts; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_adapter(model: Any) -> dict[str, torch.Tensor] | None:
    """The adapter's weights, on the first rank, where ranks hold parts of them; then all of them must ask.

    Returns:
        None where nothing is sharded: the model has its weights itself.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    with here.waiting("gathering the adapter"):
        weights: dict[str, Any] = get_model_state_dict(model, options=options)
    return weights
