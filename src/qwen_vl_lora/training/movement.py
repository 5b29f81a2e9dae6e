"""Check that a training reached every module of its adapter. Otherwise no adapter is published."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from qwen_vl_lora.exceptions import TrainingError

logger = logging.getLogger(__name__)

_ADAPTER_PARTS = (".lora_", ".base_layer.", ".modules_to_save.")
"""Parts that follow a module's name in the names of its trainable tensors."""

_UPDATES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
"""LoRA's factors. If one is all zero, the update is zero too."""


class Movement:
    """Hashes of an adapter's tensors before training, to compare with those after it."""

    def __init__(self, model: Any) -> None:
        self._start = {name: _digest(tensor) for name, tensor in _trainable(model)}

    def check(
        self,
        model: Any,
        weights: Mapping[str, torch.Tensor] | None,
        highest_rate: float,
        reached: Collection[str] = (),
    ) -> dict[str, str]:
        """Refuse an adapter with a module that neither changed nor got a gradient, or whose update is zero.

        Args:
            model: the PeftModel that was trained.
            weights: its whole tensors, if `model` is sharded.
            highest_rate: highest learning rate of the training's steps.
            reached: names of the tensors that got a gradient other than zero.

        Returns:
            Entries for `training_summary`: none, or a warning that the learning rate changed nothing.

        Raises:
            TrainingError: naming the modules.
        """
        modules: dict[str, list[tuple[str, torch.Tensor]]] = defaultdict(list)
        for name, tensor in _trainable(model) if weights is None else weights.items():
            modules[module_of(name)].append((name, tensor))
        still = [module for module, tensors in modules.items() if self._stands_still(tensors)]
        if not still:
            return {}
        if highest_rate == 0 and len(still) == len(modules):
            told = (
                "The learning rate was 0 at every step of this training, so the adapter did not change. Train more "
                "steps, or lower training_args.warmup_steps."
            )
            logger.warning(told)
            return {"warning": told}
        reached_modules = {module_of(name) for name in reached}
        if all(module in reached_modules and self._has_an_update(modules[module]) for module in still):
            told = (
                f"The learning rate ({highest_rate:g} at most) was too low to change {len(still)} of {len(modules)} "
                "adapted modules, though each got a gradient. Raise training_args.learning_rate."
            )
            logger.warning(told)
            return {"warning": told}
        raise TrainingError(
            f"{len(still)} of {len(modules)} adapted modules did not change in training: {', '.join(still[:5])}"
            f"{' …' if len(still) > 5 else ''}. No adapter was published. Expected a gradient for each: check that the "
            "data reach them (the vision tower learns from pictures only), and training_args.learning_rate "
            f"({highest_rate:g} at most)."
        )

    def _stands_still(self, tensors: list[tuple[str, torch.Tensor]]) -> bool:
        return not self._has_an_update(tensors) or all(
            _digest(tensor) == self._start.get(name) for name, tensor in tensors
        )

    def _has_an_update(self, tensors: list[tuple[str, torch.Tensor]]) -> bool:
        factors = [tensor for name, tensor in tensors if any(f".{part}." in name for part in _UPDATES)]
        return all(bool(tensor.any()) for tensor in factors)


def _trainable(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def module_of(name: str) -> str:
    """The name of the base's module that the tensor `name` belongs to."""
    name = name.removeprefix("base_model.model.")
    ends = [name.find(part) for part in _ADAPTER_PARTS if part in name]
    return name[: min(ends)] if ends else name.rpartition(".")[0]


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).digest()
