"""The device of a run, and the precisions that it supports."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import DeviceError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_WAIT_POLICY = "OMP_WAIT_POLICY"
_LOOK_SECONDS = 0.1
_IDLE = 0.9
"""Share of time without work above which cores are idle."""

_waiting_is_ours = False


def wait_passively() -> None:
    """Let torch's threads on a CPU sleep while they wait for each other, unless the environment says otherwise.

    In a busy loop they are several times slower where other work shares the cores.
    """
    global _waiting_is_ours
    if _WAIT_POLICY not in os.environ:
        os.environ[_WAIT_POLICY] = "PASSIVE"
        _waiting_is_ours = True


def wait_as_suits_the_cores() -> None:
    """Let them wait in a busy loop if the cores are idle: small models then train a third faster.

    OpenMP reads this when torch is imported. Call it before.
    """
    if _waiting_is_ours and "torch" not in sys.modules and _cores_are_idle():
        del os.environ[_WAIT_POLICY]  # OpenMP's own way: a busy loop of about a millisecond


def _cores_are_idle() -> bool:
    """Whether nothing else computes on this machine for a moment, and this process may use all of its cores."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if limit != "max" and int(limit) < int(period) * len(os.sched_getaffinity(0)):
            return False
    except (OSError, ValueError, AttributeError):  # no limit that is known
        pass
    try:
        before = _ticks()
        time.sleep(_LOOK_SECONDS)
        passed = [after - earlier for after, earlier in zip(_ticks(), before, strict=True)]
    except (OSError, ValueError):  # not Linux
        return False
    return sum(passed[3:5]) >= _IDLE * sum(passed[:8])


def _ticks() -> list[int]:
    """Time of all cores since the start: user, nice, system, idle, waiting for disks, and others."""
    return [int(number) for number in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]]


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
