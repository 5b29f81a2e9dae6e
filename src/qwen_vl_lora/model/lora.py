"""LoRA around the base model. It adapts the vision tower only on request, and settings without effect are refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import ParameterError, TrainingError
from qwen_vl_lora.faults import is_out_of_memory, machine_fault
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import Family, family_of
from qwen_vl_lora.model.lora_checks import LoraChecks
from qwen_vl_lora.parameters import LoraParameters

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_TURNED_OFF: dict[str, dict[str, Any]] = {
    "layers_pattern": {"layers_pattern": None},
    "layers_to_transform": {"layers_to_transform": None, "layers_pattern": None},
    "modules_to_save": {"modules_to_save": None},
    "exclude_modules": {"exclude_modules": None},
    "rank_pattern": {"rank_pattern": None},
    "alpha_pattern": {"alpha_pattern": None},
    "init_lora_weights": {"init_lora_weights": None},
    "use_dora": {"use_dora": False},
    "bias": {"bias": "none"},
}
"""How to turn a setting off. The one without which PEFT accepts the rest is the one that it refused."""


def build_lora_config(lora: LoraParameters, vision: str, family: Family) -> LoraConfig:
    """PEFT's configuration; `target_modules` stays a plain list, which other tools read."""
    from peft import LoraConfig

    given = lora.model_dump(exclude={"exclude_modules"})
    excluded = excluded_modules(lora.exclude_modules, vision, family)
    return LoraConfig(**given, exclude_modules=excluded, task_type="CAUSAL_LM")


def excluded_modules(modules: list[str] | str | None, vision: str, family: Family) -> list[str] | str | None:
    """PEFT's `exclude_modules`: the modules that the user names, and those of the tower unless it is adapted.

    PEFT matches a list of targets by suffix, and a tower's modules may have the names of the language model's.
    """
    if vision == "adapted" or not modules:
        return modules if vision == "adapted" else family.tower_modules
    names = modules if isinstance(modules, str) else rf"(.*\.)?({'|'.join(map(re.escape, modules))})"
    return f"(?:{names})|{family.tower_modules}"


_NOISE = (
    (".is_gradient_checkpointing.", FutureWarning),  # peft's own call into transformers 5.2x
    ("Model has `tie_word_embeddings=True`", UserWarning),  # merging unties them
    ("The following (rank|alpha)_pattern keys", RuntimeWarning),  # refused here
    ("Using Rank-Stabilized LoRA with rank_pattern", UserWarning),  # concerns a conversion that is not used here
)


@contextmanager
def peft_without_noise() -> Iterator[None]:
    """Hide warnings of peft that do not concern this project."""
    with warnings.catch_warnings():
        for message, category in _NOISE:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def check_lora(base_model: BaseModel, lora: LoraParameters, vision: str, *, quantized: bool = False) -> None:
    """Check that the settings fit the base. PEFT wraps its modules on torch's meta device, without weights.

    Args:
        quantized: whether the training will pack the weights of linear layers.

    Raises:
        ParameterError: naming every key that PEFT refuses or that would have no effect.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base_model.path, local_files_only=True, trust_remote_code=False)
    _wrap(_module_tree(config), lora, vision, quantized=quantized, low_cpu_mem_usage=True)


def add_adapter(model: PreTrainedModel, lora: LoraParameters, vision: str, seed: int) -> PeftModel:
    """Wrap `model` in a new LoRA adapter. The same seed gives the same initial weights.

    Raises:
        ParameterError: as `check_lora`.
        TrainingError: if a vision parameter became trainable without `vision: adapted`.
    """
    from transformers import set_seed

    set_seed(seed)
    peft_model = _wrap(model, lora, vision)
    check_vision_is_untouched(peft_model, vision)
    _hasten_dropout(peft_model)
    _train_whole_modules_in_float32(peft_model)
    return peft_model


def _module_tree(config: Any) -> PreTrainedModel:
    """The model of `config` on the meta device: modules and shapes without weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model


def _wrap(
    model: PreTrainedModel, lora: LoraParameters, vision: str, *, quantized: bool = False, **options: Any
) -> PeftModel:
    checks = LoraChecks(model, lora, vision, quantized=quantized)
    _refuse(checks.faults_of_names())
    peft_model, error = _try_peft(model, lora, vision, **options)
    if error is not None:
        _refuse([_fault_of(error, model.config, lora, vision)], error)
    _refuse(checks.faults_of_effect(peft_model))
    return peft_model


def _refuse(faults: list[str], cause: Exception | None = None) -> None:
    if faults:
        lines = "\n".join(f"  lora.{fault}" for fault in faults)
        raise ParameterError(
            f"Invalid parameters in the block lora, {len(faults)} in all; nothing was trained:\n{lines}"
        ) from cause


def _try_peft(
    model: PreTrainedModel, lora: LoraParameters, vision: str, **options: Any
) -> tuple[Any, Exception | None]:
    """The wrapped model, or PEFT's error."""
    from peft import get_peft_model

    try:
        with peft_without_noise():
            return get_peft_model(model, build_lora_config(lora, vision, family_of(model.config)), **options), None
    except Exception as error:  # PEFT and torch do not specify what they raise for a setting
        if machine_fault(error) is not None or is_out_of_memory(error):
            raise
        return None, error


def _fault_of(error: Exception, config: Any, lora: LoraParameters, vision: str) -> str:
    """PEFT's error, with the setting that caused it: the first one without which PEFT accepts the others."""
    guilty = "target_modules"
    for name, off in _TURNED_OFF.items():
        without = lora.model_copy(update=off)
        if without != lora and _try_peft(_module_tree(config), without, vision, low_cpu_mem_usage=True)[1] is None:
            guilty = name
            break
    return f"{guilty}: PEFT refuses {getattr(lora, guilty)!r} for this base: {' '.join(str(error).split())[:400]}"


def _train_whole_modules_in_float32(model: PeftModel) -> None:
    """Train `modules_to_save` in float32, because half precision would round small updates away."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            module = wrapper.modules_to_save["default"]
            stored = next(module.parameters()).dtype
            if stored.itemsize < 4:
                module.float()
                module.register_forward_pre_hook(_inputs_in_float32, with_kwargs=True)
                module.register_forward_hook(partial(_outputs_as, stored))


def _inputs_in_float32(_: nn.Module, arguments: Any, keywords: Any) -> tuple[Any, Any]:
    import torch

    return _cast(arguments, torch.float32), _cast(keywords, torch.float32)


def _outputs_as(dtype: torch.dtype, _: nn.Module, __: Any, outputs: Any) -> Any:
    return _cast(outputs, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    from torch.utils import _pytree

    def cast(value: Any) -> Any:
        return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value

    return _pytree.tree_map(cast, values)


def _hasten_dropout(model: PeftModel) -> None:
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from qwen_vl_lora.model.dropout import SeededDropout

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = SeededDropout(dropout.p)


def check_vision_is_untouched(model: PeftModel, vision: str) -> None:
    """Refuse a trainable or adapted vision tower unless `vision` is `adapted`.

    Raises:
        TrainingError: naming the first such parameters.
    """
    if vision == "adapted":
        return
    family = family_of(model.get_base_model().config)
    touched = [
        name
        for name, parameter in model.named_parameters()
        if family.is_in_tower(name) and (parameter.requires_grad or ".lora_" in name)
    ]
    if touched:
        raise TrainingError(
            f"{len(touched)} parameters of the vision tower would be trained ({', '.join(touched[:3])} …), but "
            "vision is `frozen`. Narrow lora.target_modules, or set vision: adapted to train the tower too."
        )


def trainable_parameters(model: PeftModel) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
