"""Dropout whose mask does not hold up the step on a CPU.

torch draws a CPU mask on one thread, number by number: 12 to 15 % of a training step with LoRA on every
projection. Here torch's generator gives one seed for a mask and a fast bit stream gives the rest. So the
mask still follows from torch's state alone: it is repeatable, survives a resume, and is drawn again where
activations are recomputed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

_LEVELS = 1 << 16
"""Steps of the probability: 16 random bits decide on each element."""


class SeededDropout(nn.Dropout):
    """`nn.Dropout` on any device; on a CPU with a mask from a seeded bit stream.

    There the probability is the nearest multiple of 1 / 65536, and the scale fits it exactly.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dropped = round(self.p * _LEVELS)
        if not self.training or not 0 < dropped < _LEVELS or input.device.type != "cpu":
            return super().forward(input)
        return input * draw_mask(input.shape, dropped).to(input.dtype)


def draw_mask(shape: torch.Size, dropped: int) -> torch.Tensor:
    """float32: 0 with probability `dropped / 65536`, else so much that the mean is 1.

    Takes one number from torch's CPU generator.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    bits = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.uint16)[: shape.numel()]
    mask = np.multiply(bits >= dropped, np.float32(_LEVELS / (_LEVELS - dropped)))
    return torch.from_numpy(mask).view(shape)
