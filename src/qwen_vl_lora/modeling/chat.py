"""From a conversation to token ids, and which of them are scored.

The chat template decides the form; only assistant content and its end token are scored.
Nothing is ever cut: a conversation that is too long is named, not truncated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_lora.exceptions import BaseModelError, DataFormatError
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.samples.conversations import Conversation, ImagePart
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """One conversation as the model reads it.

    Attributes:
        id: the conversation's id.
        ids: token ids, (T,) int64; each picture already stands as its full run of image tokens.
        scored: (T,) bool; True on assistant content and its end token.
        is_image: (T,) bool; True on image tokens.
        images: sha256 of the pictures, in reading order.
        grids: (1, patches down, patches across) of each picture.
    """

    id: str
    ids: np.ndarray
    scored: np.ndarray
    is_image: np.ndarray
    images: tuple[str, ...]
    grids: tuple[tuple[int, int, int], ...]

    @property
    def prompt_length(self) -> int:
        """Tokens before the first scored one; the length itself when nothing is scored."""
        return int(self.scored.argmax()) if self.scored.any() else len(self.ids)


class ChatEncoder:
    """Turns conversations into token ids by the processor's own chat template."""

    def __init__(self, processor: Any, sizer: PictureSizer, images: ImageStore) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._sizer = sizer
        self._images = images
        self._image_token = self._tokenizer.convert_tokens_to_ids(processor.image_token)
        self._end_token: str = self._tokenizer.eos_token

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The whole conversation, answers scored."""
        segments = self._segments(self._messages(conversation))
        return self._assemble(conversation, segments)

    def encode_prompt(self, conversation: Conversation) -> EncodedConversation:
        """What the model sees before it writes the last answer; nothing is scored."""
        last_role, _ = conversation.turns[-1]
        turns = conversation.turns[:-1] if last_role == "assistant" else conversation.turns
        asked = Conversation(conversation.id, turns)
        text = self._render(self._messages(asked), add_generation_prompt=True)
        return self._assemble(asked, [(text, False)])

    def _messages(self, conversation: Conversation) -> list[Message]:
        messages: list[Message] = []
        for role, parts in conversation.turns:
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in parts
            ]
            messages.append({"role": role, "content": content})
        return messages

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        text: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _segments(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether it is scored."""
        segments: list[tuple[str, bool]] = []
        done = ""
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:position], add_generation_prompt=True)
            after = self._render(messages[: position + 1], add_generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise BaseModelError(
                    "The base model's chat template rewrites earlier turns when later ones are added, so prompt and "
                    "answer cannot be told apart. Use the template of Qwen2-VL-Instruct or Qwen2.5-VL-Instruct."
                )
            answer, end, rest = after[len(before) :].partition(self._end_token)
            segments += [(before[len(done) :], False), (answer + end, True), (rest, False)]
            done = after
        return segments

    def _assemble(self, conversation: Conversation, segments: list[tuple[str, bool]]) -> EncodedConversation:
        names, grids = self._pictures(conversation)
        encoded = self._tokenizer([text for text, _ in segments], add_special_tokens=False)["input_ids"]
        ids = np.array([token for piece in encoded for token in piece], dtype=np.int64)
        scored = np.repeat([is_scored for _, is_scored in segments], [len(piece) for piece in encoded])
        slots = np.flatnonzero(ids == self._image_token)
        if len(slots) != len(names):
            raise DataFormatError(
                f"Conversation {conversation.id!r} holds {len(names)} pictures, but {len(slots)} image places in its "
                f"text. Remove {self._processor.image_token} from its texts."
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[slots] = [self._sizer.num_tokens(grid) for grid in grids]
        ids = ids.repeat(repeats)
        return EncodedConversation(conversation.id, ids, scored.repeat(repeats), ids == self._image_token, names, grids)

    def _pictures(self, conversation: Conversation) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
        entries = [self._images.by_path(path) for path in conversation.image_paths]
        names = tuple(entry.sha256 for entry in entries)
        return names, tuple(self._sizer.grid(entry.width, entry.height) for entry in entries)


def part_by_length(
    encoded: Sequence[EncodedConversation], max_length: int, max_share: float
) -> tuple[list[EncodedConversation], list[EncodedConversation]]:
    """What fits in `max_length` tokens, and what is too long; cutting it would cut image tokens or its answer.

    Raises:
        DataFormatError: if a larger share than `max_share` does not fit.
    """
    long = [item for item in encoded if len(item.ids) > max_length]
    if not long:
        return list(encoded), []
    longest = max(long, key=lambda item: len(item.ids))
    facts = (
        f"{len(long)} of {len(encoded)} conversations are longer than max_length {max_length} tokens; the longest is "
        f"{longest.id!r} with {len(longest.ids)}."
    )
    if len(long) > max_share * len(encoded):
        raise DataFormatError(
            f"{facts} That is more than quarantine.max_share {max_share:.0%}. Raise max_length to "
            f"{len(longest.ids)}, lower the image size, or shorten those texts: nothing is cut."
        )
    named = ", ".join(item.id for item in long[:20])
    logger.warning("%s They are left out of training and listed in left_out_samples: %s.", facts, named)
    return [item for item in encoded if len(item.ids) <= max_length], long
