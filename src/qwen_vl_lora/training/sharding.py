"""FSDP: how the model is sharded, and how states are gathered and distributed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qwen_vl_lora.cluster import here
from qwen_vl_lora.model.families import family_of

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def shard(model: Any) -> None:
    """Shard the weights over the ranks, layer by layer. Each layer is gathered when it is computed."""
    base = model.get_base_model()
    for layer in family_of(base.config).language_model_of(base).layers:
        fully_shard(layer)
    fully_shard(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. If it is sharded, all ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_adapter(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole weights of a sharded adapter, on the first rank. All ranks must call this.

    Returns:
        None if nothing is sharded: the model then has the whole weights.
    """
    if not _is_sharded(model):
        return None
    with here.waiting("gathering the adapter"):
        weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return weights


def load_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> bool:
    """Load an adapter's weights into a sharded model, on each rank its parts. False if nothing is sharded."""
    if not _is_sharded(model):
        return False
    with torch.no_grad():
        for name, held in get_peft_model_state_dict(model, save_embedding_layers=False).items():
            whole = weights[name].to(held.device)
            held.copy_(distribute_tensor(whole, held.device_mesh, held.placements))
    return True


def whole_optimizer(model: Any, optimizer: Any) -> dict[str, Any]:
    """The whole state of the optimizer, on the first rank. All ranks must call this if it is sharded."""
    if not _is_sharded(model):
        state: dict[str, Any] = optimizer.state_dict()
        return state
    with here.waiting("gathering the optimizer's state"):
        return get_optimizer_state_dict(model, optimizer.optimizer, options=_WHOLE)


def load_optimizer(model: Any, optimizer: Any, state: dict[str, Any]) -> None:
    """Load a state from `whole_optimizer`."""
    if _is_sharded(model):
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


def _is_sharded(model: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
