"""The model families that can be trained, a module each. They import neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.model.families.family import Family
from qwen_vl_lora.model.families.qwen2_5_vl import QWEN2_5_VL
from qwen_vl_lora.model.families.qwen2_vl import QWEN2_VL
from qwen_vl_lora.model.families.qwen3_5 import QWEN3_5
from qwen_vl_lora.model.families.qwen3_vl import QWEN3_VL

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["FAMILIES", "QWEN2_5_VL", "QWEN2_VL", "QWEN3_5", "QWEN3_VL", "Family", "family_of", "family_of_published"]

FAMILIES: tuple[Family, ...] = (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN3_5)


def family_of(config: Mapping[str, Any] | PretrainedConfig, model: str = "The base model") -> Family:
    """The family of a parsed config.json, or of a loaded model's config.

    Args:
        model: the subject of the message.

    Raises:
        BaseModelError: naming a family that is not supported.
    """
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise BaseModelError(f"{model} is of family {str(model_type)!r}; supported: {supported}.")


def family_of_published(name: str) -> Family | None:
    """The family of a published checkpoint by its hub id, such as Qwen/Qwen2-VL-2B-Instruct; None for an unknown id."""
    return next((family for family in FAMILIES if name in family.published), None)
