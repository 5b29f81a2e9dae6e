"""A model's logits on a few held-out conversations, to test whether two models are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vl_lora.evaluation.generation import batch_prompts
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.conversations import Conversation
from qwen_vl_lora.samples.image_store import ImageStore

NUM_CONVERSATIONS = 8
NUM_POSITIONS = 16
"""Last positions of each conversation, most of them in its answer: 78 MB for the vocabulary of 152,000 words."""


@dataclass(frozen=True)
class LogitsProbe:
    """Computes logits of any model on the same conversations, with pictures as pixels."""

    inputs: dict[str, Any]

    @classmethod
    def on(
        cls, base_model: BaseModel, images: ImageStore, conversations: Sequence[Conversation], image: ImageParameters
    ) -> LogitsProbe:
        """Probe with the first of the conversations.

        Raises:
            DataFormatError: if there is none.
        """
        if not conversations:
            raise DataFormatError(
                "test_conversations is empty, so a merged model cannot be compared with base + adapter. "
                "Hold out images (split.test_images) and run data_engineering."
            )
        encoder = ChatEncoder(base_model.load_processor(), image, images)
        encoded = [encoder.encode(conversation) for conversation in conversations[:NUM_CONVERSATIONS]]
        return cls(batch_prompts(encoded, encoder.pad_id, encoder.pixels))

    def __call__(self, model: Any) -> torch.Tensor:
        """Logits (conversations, positions, vocabulary), float32 on the CPU."""
        inputs = {name: value.to(model.device) for name, value in self.inputs.items()}
        with torch.inference_mode():
            logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=NUM_POSITIONS).logits
        return logits.float().cpu()
