"""Which device a run computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import DeviceError

if TYPE_CHECKING:
    import torch


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
        return torch.device("cpu")
    raise DeviceError(
        "device: cuda is asked for, but torch sees no CUDA device here. Run on a machine with a GPU, or give "
        '--params "device=cpu" (slow for the full-size models). Data pipelines run anywhere.'
    )
