"""Encode conversations and their pictures as a base model gets them: token ids, scored tokens, pixels.

The chat template determines the text. Only assistant content and its end token are scored, except where the data
says `"loss": false`.
Nothing is truncated: conversations that are too long are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_lora.exceptions import BaseModelError, DataFormatError
from qwen_vl_lora.model.pictures import PictureSizer, pixel_inputs
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.conversations import Conversation, ImagePart
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

Message = dict[str, Any]

_QUESTIONS_KEPT = 1_000
"""Different questions whose token ids are in memory."""


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """One conversation as the model gets it.

    Attributes:
        id: the conversation's id.
        ids: token ids, (T,) int64; each picture is its full run of image tokens.
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


def rope_positions(conversation: EncodedConversation, merge_size: int) -> np.ndarray:
    """Multimodal rotary positions (3, T): temporal, height and width.

    Source: `Qwen2VLModel.get_rope_index`, for pictures without motion; that method needs the model.
    """
    positions = np.empty((3, len(conversation.ids)), dtype=np.int64)
    edges = np.flatnonzero(np.diff(conversation.is_image, prepend=False, append=False))
    grids = iter(conversation.grids)
    done, following = 0, 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        positions[:, done:start] = following + np.arange(start - done)
        following += start - done
        while start < stop:  # runs of two pictures may be adjacent
            _, down, across = next(grids)
            down, across = down // merge_size, across // merge_size
            size = down * across
            positions[0, start : start + size] = following
            positions[1, start : start + size] = following + np.repeat(np.arange(down), across)
            positions[2, start : start + size] = following + np.tile(np.arange(across), down)
            following += max(down, across)
            start += size
        done = stop
    positions[:, done:] = following + np.arange(len(conversation.ids) - done)
    return positions


def render(processor: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    """Messages as the chat template writes them, with thinking off where the template has it."""
    text: str = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_options(processor)
    )
    return text


def template_options(processor: Any) -> dict[str, Any]:
    """Options that every use of the chat template needs. transformers refuses one that the template does not have."""
    return {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}


class ChatEncoder:
    """Encodes conversations with the processor's chat template, and their pictures in the configured size.

    Args:
        processor: of the base model.
        image: size of the pictures.
        images: store of the pictures that the conversations name.

    Raises:
        ParameterError: as `PictureSizer`.
    """

    def __init__(self, processor: Any, image: ImageParameters, images: ImageStore) -> None:
        self.processor = processor
        self.images = images
        vision = processor.image_processor
        self.sizer = PictureSizer(image, vision.patch_size, vision.merge_size)
        self._tokenizer = processor.tokenizer
        self._image_token = self._tokenizer.convert_tokens_to_ids(processor.image_token)
        self._end_token: str = self._tokenizer.eos_token
        self._questions: dict[Any, list[int]] = {}

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The whole conversation with scored answers."""
        texts, scored = zip(*self._segments(conversation), strict=True)
        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return self._assemble(conversation, list(zip(encoded, scored, strict=True)))

    def encode_prompt(self, conversation: Conversation) -> EncodedConversation:
        """The conversation up to the last answer, for generation. Nothing is scored."""
        last_role, _ = conversation.turns[-1]
        turns = conversation.turns[:-1] if last_role == "assistant" else conversation.turns
        asked = Conversation(conversation.id, turns)
        return self._assemble(asked, [(self._question_ids(asked), False)])

    def _question_ids(self, asked: Conversation) -> list[int]:
        """Token ids of a question, pictures as one token each. Most questions of a run have the same words."""
        words = tuple(
            (role, tuple(None if isinstance(part, ImagePart) else part.text for part in parts))
            for role, parts in asked.turns
        )
        if words not in self._questions:
            if len(self._questions) == _QUESTIONS_KEPT:
                self._questions.clear()
            text = render(self.processor, self._messages(asked), add_generation_prompt=True)
            self._questions[words] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._questions[words]

    def pixels(self, names: Sequence[str]) -> dict[str, Any]:
        """The model's arguments for pictures (sha256), in reading order, for a tower that computes them."""
        if not names:
            return {}
        return dict(pixel_inputs(self.processor, self.sizer, [self.images.open(name) for name in names]))

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        pad_id: int = self._tokenizer.pad_token_id
        return pad_id

    def _messages(self, conversation: Conversation) -> list[Message]:
        messages: list[Message] = []
        for role, parts in conversation.turns:
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in parts
            ]
            messages.append({"role": role, "content": content})
        return messages

    def _segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered text in pieces, and for each whether it is scored.

        A thinking template takes the empty think block of an answer away when another turn follows. That answer can
        then not be scored: its prompt in training would not be the one it is generated from.
        """
        messages, unscored = self._messages(conversation), conversation.unscored
        segments: list[tuple[str, bool]] = []
        done = ""
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render(self.processor, messages[:position], add_generation_prompt=True)
            after = render(self.processor, messages[: position + 1], add_generation_prompt=False)
            if not before.startswith(done) and not any(is_scored for _, is_scored in segments):
                segments, done = [], ""
            if not before.startswith(done):
                raise BaseModelError(
                    f"Conversation {conversation.id!r}: the base model's chat template rewrites earlier turns when "
                    'later ones are added, so only the last answer can be trained. Set "loss": false for the others, '
                    "or give each answer a conversation of its own."
                )
            if not after.startswith(before):
                raise BaseModelError(
                    f"Conversation {conversation.id!r}: the base model's chat template does not begin the answer with "
                    f"the prompt's end {before[-50:]!r}; got {after[-200:]!r}. Thinking is off in every prompt: remove "
                    "<think> blocks from answers, or use the template of the published checkpoint."
                )
            answer, end, rest = after[len(before) :].partition(self._end_token)
            segments += [(before[len(done) :], False), (answer + end, position not in unscored), (rest, False)]
            done = after
        return segments

    def _assemble(self, conversation: Conversation, pieces: list[tuple[list[int], bool]]) -> EncodedConversation:
        """Pieces of token ids, and whether they are scored, with the image tokens that the pictures have."""
        names, grids = self._pictures(conversation)
        ids = np.array([token for piece, _ in pieces for token in piece], dtype=np.int64)
        scored = np.repeat([is_scored for _, is_scored in pieces], [len(piece) for piece, _ in pieces])
        slots = np.flatnonzero(ids == self._image_token)
        if len(slots) != len(names):
            raise DataFormatError(
                f"Conversation {conversation.id!r} holds {len(names)} pictures, but {len(slots)} image places in its "
                f"text. Remove {self.processor.image_token} from its texts."
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[slots] = [self.sizer.num_tokens(grid) for grid in grids]
        ids = ids.repeat(repeats)
        return EncodedConversation(conversation.id, ids, scored.repeat(repeats), ids == self._image_token, names, grids)

    def _pictures(self, conversation: Conversation) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
        entries = [self.images.by_path(path) for path in conversation.image_paths]
        names = tuple(entry.sha256 for entry in entries)
        return names, tuple(self.sizer.grid(entry.width, entry.height) for entry in entries)


def part_by_length(
    encoded: Sequence[EncodedConversation], max_length: int, max_share: float
) -> tuple[list[EncodedConversation], list[EncodedConversation]]:
    """The conversations that fit in `max_length` tokens, and those that are too long. None is truncated.

    Raises:
        DataFormatError: if the share of those that do not fit is above `max_share`.
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
