"""A processor's place while the base model is not on this machine: Qwen's chat form, and token counts by estimate.

Words are cut by a rule of thumb in place of the vocabulary: image tokens and the chat form's own tokens are exact,
those of texts are not.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from qwen_vl_lora.modeling.geometry import Geometry

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_SYSTEM = "You are a helpful assistant."
_PIECES = re.compile(
    r"<\|\w+\|>"
    r"| ?[A-Za-z]{1,9}"  # common English words are one token
    r"|[\u3040-\u30ff\u4e00-\u9fff]{1,2}"  # Chinese: about 0.6 tokens a character
    r"|\d|\s+|."
)


@dataclass(frozen=True)
class StandInTokenizer:
    """Cuts texts into about as many pieces as Qwen's tokenizer."""

    eos_token: str = "<|im_end|>"

    def convert_tokens_to_ids(self, token: str) -> int:
        return _SPECIAL.index(token) if token in _SPECIAL else len(_SPECIAL) + zlib.crc32(token.encode())

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.convert_tokens_to_ids(piece) for piece in _PIECES.findall(text)] for text in texts]}


@dataclass(frozen=True)
class StandInProcessor:
    """What `ChatEncoder` and `PictureSizer` ask of a processor."""

    geometry: Geometry
    image_token: str = "<|image_pad|>"
    tokenizer: StandInTokenizer = field(default_factory=StandInTokenizer)

    @property
    def image_processor(self) -> SimpleNamespace:
        return SimpleNamespace(patch_size=self.geometry.patch_size, merge_size=self.geometry.merge_size)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": _SYSTEM}]}, *messages]
        text = "".join(
            f"<|im_start|>{message['role']}\n{''.join(map(self._part, message['content']))}<|im_end|>\n"
            for message in messages
        )
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def _part(self, part: dict[str, Any]) -> str:
        return f"<|vision_start|>{self.image_token}<|vision_end|>" if part["type"] == "image" else str(part["text"])
