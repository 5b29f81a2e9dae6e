"""The device of a run, and the precisions that it supports."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import DeviceError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def choose_device(wanted: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        DeviceError: if `cuda` is requested and not available.
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


def memory_of(device: torch.device) -> int | None:
    """Memory of a GPU in bytes; None for a CPU."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@functools.cache
def _say_what_is_left_idle() -> None:
    """Log an accelerator that is present but not used."""
    import torch

    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if found is not None and found.type != "cuda":  # a CUDA build reports cuda even without a GPU
        logger.info("device: auto computes on the CPU: %s was found, but only CUDA is supported.", found.type)


def usable_dtype(dtype: str, device: torch.device) -> str:
    """`dtype`, or float16 instead of bfloat16 on a GPU without it."""
    if dtype != "bfloat16" or _has_bfloat16(device):
        return dtype
    _say_once(f"This GPU has no bfloat16 ({device}): computing in float16, which changes results slightly.")
    return "float16"


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the device has native bfloat16. torch emulates it on older GPUs, many times slower."""
    import torch

    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def check_attention(attention: str) -> None:
    """Check that the requested attention is installed. Imports nothing.

    Raises:
        DeviceError: if it is not.
    """
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise DeviceError(
            "attention: flash_attention_2 is asked for, but the package flash-attn is not installed. Install it "
            "(pip install flash-attn --no-build-isolation; it needs a CUDA compiler), or set attention: sdpa, which "
            "uses the same kernels where it can."
        )
