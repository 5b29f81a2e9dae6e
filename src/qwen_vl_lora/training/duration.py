"""How long a training would roughly take on usual GPUs: from floating-point operations and published peaks.

    seconds = the larger of  samples x FLOPs of a sample / (peak x utilization)
                             forward passes x layers x 2 to 5 ms, in which the GPU waits for its next kernels
    FLOPs   = a N t + b n t + a H V s,   a = 4, b = 6; with gradient checkpointing a = 6, b = 8

`N` is the number of parameters of the language model's linear layers, `n` LoRA's, `t` the tokens of a sample (those of
a shared row are counted once), `H` the hidden size, `V` the vocabulary, `s` scored tokens. A frozen layer costs 2 FLOPs
for each parameter and token forward, and 2 for the gradient of its input; a trained one 2 more for its own gradient;
checkpointing repeats the forward pass. Attention's products of tokens with tokens, padding, encoding and evaluation are
left out. Utilization and milliseconds are assumed, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.training.memory import MemoryModel
from qwen_vl_lora.training.rows import group_rows

UTILIZATION = (0.4, 0.1)
"""Assumed shares of the peak that a training reaches: highest, lowest."""

_LAYER_SECONDS = (0.002, 0.005)
"""Assumed least time for a layer forward and backward, LoRA and the host's work included: shortest, longest."""


@dataclass(frozen=True)
class Gpu:
    """A usual GPU.

    Attributes:
        memory: in GiB, as sold.
        teraflops: the maker's peak of dense bfloat16 with float32 sums.
    """

    name: str
    memory: int
    teraflops: float


GPUS = (
    Gpu("RTX 3090", 24, 71),
    Gpu("L4", 24, 121),
    Gpu("RTX 4090", 24, 165),
    Gpu("L40S", 48, 362),
    Gpu("A100", 80, 312),
    Gpu("H100", 80, 989),
)


@dataclass(frozen=True)
class RoughTime:
    """The shortest and longest time of a training on a GPU.

    Attributes:
        fits: whether its memory is enough.
    """

    gpu: str
    memory: int
    teraflops: float
    seconds: list[float]
    fits: bool


def rough_times(
    model: MemoryModel, train: Sequence[EncodedConversation], parameters: Parameters, steps: int, needed: int
) -> list[RoughTime]:
    """Return an estimate for each GPU; none in float32 and for an adapted tower, for which the formula is wrong.

    Args:
        steps: optimizer steps of the whole training.
        needed: bytes of GPU memory.
    """
    if model.dtype == "float32" or model.tower:
        return []
    rows = group_rows(train, parameters.rows, parameters.max_length)
    tokens = sum(row.length for row in rows) / len(train)
    scored = sum(int(conversation.scored.sum()) for conversation in train) / len(train)
    arguments = parameters.training_args
    batch = arguments.per_device_train_batch_size
    passes = steps * (1 if batch == "auto" else math.ceil(arguments.captions_per_step / batch))
    flops = steps * arguments.captions_per_step * flops_of_sample(model, tokens, scored)  # of one process

    def seconds(gpu: Gpu) -> list[float]:
        computing = (flops / (gpu.teraflops * 1e12 * share) for share in UTILIZATION)
        waiting = (passes * model.geometry.layers * least for least in _LAYER_SECONDS)
        return [max(pair) for pair in zip(computing, waiting, strict=True)]

    return [RoughTime(gpu.name, gpu.memory, gpu.teraflops, seconds(gpu), needed <= gpu.memory * 2**30) for gpu in GPUS]


def flops_of_sample(model: MemoryModel, tokens: float, scored: float) -> float:
    """Return the floating-point operations of one sample, forward and backward."""
    geometry = model.geometry
    again = 2 if model.checkpointing else 0
    frozen = (4 + again) * (geometry.projection_parameters * tokens + geometry.hidden * geometry.vocabulary * scored)
    return frozen + (6 + again) * model.lora_parameters * tokens
