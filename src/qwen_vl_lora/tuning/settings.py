"""What a training run is told, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_vl_lora.parameters import (
    GenerationParameters,
    ImageParameters,
    LoraParameters,
    PromptParameters,
    TrainingParameters,
)


@dataclass(frozen=True)
class TrainingSettings:
    """The blocks of parameters.yml that training reads.

    `prompt` and `generation` do not change the weights; they travel with the adapter.
    """

    prompt: PromptParameters
    image: ImageParameters
    max_length: int
    max_share: float
    lora: LoraParameters
    training_args: TrainingParameters
    vision: Literal["frozen", "adapted"]
    rows: Literal["shared", "separate"]
    resume: str
    device: str
    attention: str
    quantization: str | None
    init_adapter: str | None
    generation: GenerationParameters
