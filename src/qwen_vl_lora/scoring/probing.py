"""A model's logits on a few held-out conversations: the measure of whether two models are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.features.inputs import PixelPictures
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.chat import ChatEncoder
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.scoring.generation import batch_prompts

NUM_CONVERSATIONS = 8
NUM_POSITIONS = 16
"""Last positions of each conversation, most of them in its answer: 78 MB for the vocabulary of 152,000 words."""


@dataclass(frozen=True)
class LogitsProbe:
    """The same conversations, pictures as pixels, for every model that it is called with."""

    inputs: dict[str, Any]

    @classmethod
    def on(
        cls, base_model: BaseModel, images: ImageStore, records: Sequence[dict[str, Any]], image: ImageParameters
    ) -> LogitsProbe:
        """Probe with the first conversations of `records`.

        Raises:
            DataFormatError: if there is none.
        """
        if not records:
            raise DataFormatError(
                "test_conversations is empty, so a merged model cannot be compared with base + adapter. "
                "Hold out images (split.test_images) and run data_engineering."
            )
        processor = base_model.load_processor()
        sizer = PictureSizer.for_processor(processor, image)
        encoder = ChatEncoder(processor, sizer, images)
        encoded = [encoder.encode(parse_conversation(record)) for record in records[:NUM_CONVERSATIONS]]
        pictures = PixelPictures(images, processor, sizer)
        return cls(batch_prompts(encoded, processor.tokenizer.pad_token_id, pictures))

    def __call__(self, model: Any) -> torch.Tensor:
        """Logits (conversations, positions, vocabulary), float32 on the CPU."""
        inputs = {name: value.to(model.device) for name, value in self.inputs.items()}
        with torch.inference_mode():
            logits: torch.Tensor = model(**inputs, use_cache=False, logits_to_keep=NUM_POSITIONS).logits
        return logits.float().cpu()
