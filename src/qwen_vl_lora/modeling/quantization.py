"""The language model's frozen weights in 4 or 8 bits (QLoRA), by bitsandbytes.

The vision tower and the output layer keep their precision: stored features, and so the feature key, are
those of the unquantized model.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError, DeviceError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_KEPT = ["model.visual", "lm_head"]
"""Modules that are not quantized, by transformers' own matching from the start of their names."""


def check_quantization(quantization: str | None) -> None:
    """Whether bitsandbytes is installed where it is needed. Imports nothing.

    Raises:
        DeviceError: if it is not.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise DeviceError(
            f"quantization: {quantization} needs bitsandbytes, which is not installed. "
            'Install it (pip install "qwen-vl-lora[qlora]", or pip install bitsandbytes), or set quantization: null.'
        )


def quantization_config(quantization: str, dtype: str) -> BitsAndBytesConfig:
    """bitsandbytes' settings for `nf4` (with double quantization, as QLoRA has it) or `int8`.

    Args:
        dtype: precision in which quantized layers compute.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=_KEPT,
    )


def check_what_is_quantized(model: Any) -> None:
    """Other versions of transformers match names in other ways, and say nothing when they match none.

    Raises:
        BaseModelError: if a layer of the tower was quantized, or none of the language model.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    names = [name for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))]
    if not names or any(".visual." in f".{name}" for name in names):
        raise BaseModelError(
            f"Quantization reached {len(names)} layers, {sum('visual.' in name for name in names)} of them in the "
            "vision tower; required are those of the language model alone. This version of transformers is not "
            "usable with quantization."
        )
