"""Dropout with a fast mask on a CPU.

torch draws a CPU mask on one thread, number by number: 12 to 15 % of a training step with LoRA on every
projection. Here torch's generator gives one seed for each mask, and a fast bit stream gives the mask. The
mask still depends on torch's state only: it is repeatable, survives a resume, and is the same where
activations are recomputed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_LEVELS = 1 << 16
"""Levels of the probability: 16 random bits for each element."""


class SeededDropout(nn.Dropout):
    """`nn.Dropout` on any device; on a CPU with a mask from a seeded bit stream.

    On a CPU the probability is the nearest multiple of 1 / 65536, with the matching scale.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * _LEVELS)
        if not self.training or not 0 < dropped < _LEVELS or input.device.type != "cpu":
            return super().forward(input)
        return input * draw_mask(input.shape, dropped).to(input.dtype)


def draw_mask(shape: torch.Size, dropped: int) -> torch.Tensor:
    """float32: 0 with probability `dropped / 65536`, else the value that makes the mean 1.

    Draws one number from torch's CPU generator.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    bits = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    mask = np.multiply(bits >= dropped, np.float32(_LEVELS / (_LEVELS - dropped)))
    return torch.from_numpy(mask).view(shape)
