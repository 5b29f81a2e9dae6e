"""LoRA around the base model, kept out of the vision tower unless asked in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import BaseModelError, TrainingError
from qwen_vl_lora.parameters import LoraParameters

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# Qwen2.5-VL's vision MLP carries the same module names as the language model's, and PEFT matches a
# list by suffix: without this exclusion the usual target list adapts the tower too.
VISION_MODULES = r"(.*\.)?visual\..*"


def build_lora_config(lora: LoraParameters, vision: str) -> LoraConfig:
    """PEFT's configuration; `target_modules` stays the plain list that other tools read."""
    from peft import LoraConfig

    exclude = None if vision == "adapted" else VISION_MODULES
    return LoraConfig(**lora.model_dump(), exclude_modules=exclude, task_type="CAUSAL_LM")


@contextmanager
def peft_without_noise() -> Iterator[None]:
    """Hide the deprecation warning that peft's own call into transformers 5.2x gives."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
        yield


def add_adapter(model: PreTrainedModel, lora: LoraParameters, vision: str, seed: int) -> PeftModel:
    """Wrap `model` in a fresh LoRA adapter. The same seed gives the same initial weights.

    Raises:
        BaseModelError: if no module matches `lora.target_modules`.
        TrainingError: if a vision parameter became trainable without `vision: adapted`.
    """
    from peft import get_peft_model
    from transformers import set_seed

    set_seed(seed)
    try:
        with peft_without_noise():
            peft_model = get_peft_model(model, build_lora_config(lora, vision))
    except ValueError as error:
        raise BaseModelError(f"lora.target_modules {lora.target_modules} cannot be adapted: {error}") from error
    check_vision_is_untouched(peft_model, vision)
    _hasten_dropout(peft_model)
    return peft_model


def _hasten_dropout(model: PeftModel) -> None:
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from qwen_vl_lora.modeling.dropout import SeededDropout

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = SeededDropout(dropout.p)


def check_vision_is_untouched(model: PeftModel, vision: str) -> None:
    """Refuse a trainable or adapted vision tower that nobody asked for.

    Raises:
        TrainingError: naming the first such parameters.
    """
    if vision == "adapted":
        return
    touched = [
        name
        for name, parameter in model.named_parameters()
        if ".visual." in name and (parameter.requires_grad or ".lora_" in name)
    ]
    if touched:
        raise TrainingError(
            f"{len(touched)} parameters of the vision tower would be trained ({', '.join(touched[:3])} …), but "
            "vision is `frozen`. Narrow lora.target_modules, or set vision: adapted to train the tower too."
        )


def trainable_parameters(model: PeftModel) -> int:
    """How many numbers the optimizer changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
