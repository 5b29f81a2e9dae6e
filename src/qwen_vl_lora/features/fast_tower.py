"""A frozen vision tower in fewer passes over its activations, with the same features to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import QuickGELUActivation

_QUICK_GELU = 1.702
"""quick-GELU is x · sigmoid(1.702 x), which is silu(1.702 x) / 1.702."""


class PatchProduct(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product: each patch is used once.

    torch has no fast 3-D convolution in half precision; recent versions take the slow one on GPUs too.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(patches, channels, time, height, width) → (patches, hidden)."""
        return functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def quicken(tower: Any) -> Any:
    """Change a loaded tower for encoding and return it.

    The patch embedding becomes a matrix product. In float32, quick-GELU's factor moves into the weights around it,
    so that the activation is one pass in place; half precision would round these weights anew.
    """
    embed = tower.patch_embed
    if isinstance(embed.proj, nn.Conv3d) and embed.proj.stride == embed.proj.kernel_size:
        embed.proj = PatchProduct(embed.proj)
    for module in list(tower.modules()):
        if isinstance(getattr(module, "act", None), QuickGELUActivation) and tower.dtype == torch.float32:
            with torch.no_grad():
                module.fc1.weight.mul_(_QUICK_GELU)
                module.fc1.bias.mul_(_QUICK_GELU)
                module.fc2.weight.div_(_QUICK_GELU)
            module.act = nn.SiLU(inplace=True)
    return tower
