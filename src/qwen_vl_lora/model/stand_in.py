"""Processors for a plan, which counts tokens and needs neither torch nor transformers (8 s of CPU to import).

If the base is on this machine, its own tokenizer and chat template are read: the tokens are those of a run. If it is
not, a stand-in has Qwen's chat format and splits text by rules of thumb instead of the vocabulary: counts of image
tokens and of the chat format's tokens are exact, counts of text tokens are estimates.
"""

from __future__ import annotations

import functools
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen_vl_lora.model.families.family import IM_END, IM_START, IMAGE_TOKEN, VISION_END, VISION_START, Family

_SPECIAL = (IM_START, IM_END, VISION_START, IMAGE_TOKEN, VISION_END)
_PIECES = re.compile(
    r"<\|\w+\|>|</?think>"
    r"| ?[A-Za-z]{1,9}"  # common English words are one token
    r"|[\u3040-\u30ff\u4e00-\u9fff]{2}(?=[\u3040-\u30ff\u4e00-\u9fff])"  # Chinese: 0.6 to 0.7 tokens a character
    r"|[\u3040-\u30ff\u4e00-\u9fff]"
    r"|\d|\s+|."
)


@dataclass(frozen=True)
class StandInTokenizer:
    """Splits texts into about as many pieces as Qwen's tokenizer."""

    eos_token: str = IM_END

    def convert_tokens_to_ids(self, token: str) -> int:
        return _SPECIAL.index(token) if token in _SPECIAL else len(_SPECIAL) + zlib.crc32(token.encode())

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.convert_tokens_to_ids(piece) for piece in _PIECES.findall(text)] for text in texts]}


@dataclass(frozen=True)
class StandInProcessor:
    """The part of a processor that `ChatEncoder` and `PictureSizer` use."""

    family: Family
    image_token: str = IMAGE_TOKEN
    chat_template: str = ""
    tokenizer: StandInTokenizer = field(default_factory=StandInTokenizer)

    @property
    def image_processor(self) -> SimpleNamespace:
        return SimpleNamespace(patch_size=self.family.patch_size, merge_size=self.family.merge_size)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        system = self.family.default_system
        if messages[0]["role"] != "system" and system is not None:
            messages = [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]
        text = "".join(
            f"{IM_START}{message['role']}\n{self._start(message, messages)}"
            f"{''.join(map(self._part, message['content']))}{IM_END}\n"
            for message in messages
        )
        return text + (f"{IM_START}assistant\n{self.family.answer_start}" if add_generation_prompt else "")

    def _start(self, message: dict[str, Any], messages: list[dict[str, Any]]) -> str:
        return self.family.answer_start if message is messages[-1] and message["role"] == "assistant" else ""

    def _part(self, part: dict[str, Any]) -> str:
        return f"{VISION_START}{self.image_token}{VISION_END}" if part["type"] == "image" else str(part["text"])


@dataclass(frozen=True)
class FileTokenizer:
    """The tokenizer in a base's `tokenizer.json`.

    Attributes:
        eos_token: that of `tokenizer_config.json`.
    """

    tokenizer: Any
    eos_token: str

    def convert_tokens_to_ids(self, token: str) -> int:
        number: int = self.tokenizer.token_to_id(token)
        return number

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}


@dataclass(frozen=True)
class FileProcessor(StandInProcessor):
    """A base's own tokenizer and chat template."""

    tokenizer: Any = None
    chat_template: str = ""

    @functools.cached_property
    def _rendered(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.chat_template)

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        text: str = self._rendered.render(messages=messages, add_generation_prompt=add_generation_prompt)
        return text


def processor_of_files(folder: Path, family: Family) -> FileProcessor | None:
    """Read tokenizer and chat template of a base; None if its files have another form, which transformers may read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stated = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except Exception:  # tokenizers raises Exception itself
        return None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    eos_token = stated["content"] if isinstance(stated, dict) else stated
    return FileProcessor(family, tokenizer=FileTokenizer(tokenizer, eos_token), chat_template=template)
