"""Loss, gradients, logits and captions by transformers and PEFT alone, from pixels, one conversation at a time.

It imports nothing of this project, so nothing of it can be wrong in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from qwen_vl_utils import fetch_image
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor

Talk = list[dict[str, Any]]
"""Turns: `role`, `parts` (texts, and paths of pictures), and `scored` for an answer."""


class PlainModel:
    """A model folder, with or without an adapter folder.

    Args:
        options: of the chat template.
        limits: qwen-vl-utils' pixel limits.
    """

    def __init__(self, folder: Path, adapter: Path | None, options: dict[str, Any], limits: dict[str, int]) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        if adapter is not None:
            self.model = PeftModel.from_pretrained(self.model, adapter, is_trainable=True)
        self.model.eval()
        self._options, self._limits = options, limits

    def inputs(self, talk: Talk, *, asks: bool) -> Any:
        """What the processor makes of a conversation; `asks` for the next answer."""
        messages = [{"role": turn["role"], "content": [_content(part) for part in turn["parts"]]} for turn in talk]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **self._options)
        patch = self.processor.image_processor.patch_size
        pictures = [
            fetch_image({"image": Image.open(part), **self._limits}, image_patch_size=patch)
            for turn in talk
            for part in turn["parts"]
            if isinstance(part, Path)
        ]
        return self.processor(text=[text], images=pictures or None, do_resize=False, return_tensors="pt")

    def answers(self, talk: Talk) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits that predict the scored tokens, and those tokens."""
        inputs = self.inputs(talk, asks=False)
        ids, end = inputs["input_ids"][0], self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        places: list[int] = []
        for number, turn in enumerate(talk):
            if turn.get("scored"):
                prompt = self.inputs(talk[:number], asks=True)["input_ids"][0]
                assert torch.equal(ids[: len(prompt)], prompt)
                stop = len(prompt) + int((ids[len(prompt) :] == end).nonzero()[0]) + 1
                places += range(len(prompt), stop)
        logits = self.model(**inputs).logits[0]
        return logits[torch.tensor(places) - 1], ids[places]

    def loss(self, talks: list[Talk]) -> torch.Tensor:
        """Summed over all scored tokens."""
        losses = [functional.cross_entropy(*self.answers(talk), reduction="sum") for talk in talks]
        return torch.stack(losses).sum()

    def gradients(self, talks: list[Talk]) -> dict[str, torch.Tensor]:
        """Of the adapter's weights, by name."""
        self.model.zero_grad()
        self.loss(talks).backward()
        return {name: value.grad for name, value in self.model.named_parameters() if value.requires_grad}

    @torch.inference_mode()
    def caption(self, talk: Talk, new_tokens: int) -> str:
        """The next answer, greedily."""
        inputs = self.inputs(talk, asks=True)
        ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        written = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(written, skip_special_tokens=True)[0].strip()


def _content(part: str | Path) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Path) else {"type": "text", "text": part}
