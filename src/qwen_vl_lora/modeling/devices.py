"""Which device a run computes on, and in which precision it can."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.parameters import TrainingParameters

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        DeviceError: if `cuda` is asked for and there is none.
    """
    import torch

    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted == "auto":
        _say_what_is_left_idle()
        return torch.device("cpu")
    raise DeviceError(
        "device: cuda is asked for, but torch sees no CUDA device here. Run on a machine with a GPU, or give "
        '--params "device=cpu" (slow for the full-size models). Data pipelines run anywhere.'
    )


@functools.cache
def _say_what_is_left_idle() -> None:
    """An accelerator that is there and not used should not be a riddle."""
    import torch

    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if found is not None and found.type != "cuda":  # a CUDA build names it where no GPU is
        logger.info("device: auto computes on the CPU: %s is here, but only CUDA is supported.", found.type)


def usable_dtype(dtype: str, device: torch.device) -> str:
    """`dtype`, or float16 in place of bfloat16 on a GPU that has none."""
    if dtype != "bfloat16" or _has_bfloat16(device):
        return dtype
    _say_once(f"This GPU has no bfloat16 ({device}): computing in float16, which changes results slightly.")
    return "float16"


def usable_precision(training_args: TrainingParameters, device: torch.device) -> TrainingParameters:
    """The same arguments with `fp16` in place of `bf16` on a GPU without it; what is recorded is what ran."""
    if usable_dtype(training_args.dtype, device) == training_args.dtype:
        return training_args
    return training_args.model_copy(update={"bf16": False, "fp16": True})


def _has_bfloat16(device: torch.device) -> bool:
    """torch emulates it on older GPUs and calls that support; emulated, it is many times slower."""
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def check_attention(attention: str) -> None:
    """Whether the asked-for attention is installed. Imports nothing.

    Raises:
        DeviceError: if it is not.
    """
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise DeviceError(
            "attention: flash_attention_2 is asked for, but the package flash-attn is not installed. Install it "
            "(pip install flash-attn --no-build-isolation; it needs a CUDA compiler), or set attention: sdpa, which "
            "uses the same kernels where it can."
        )
