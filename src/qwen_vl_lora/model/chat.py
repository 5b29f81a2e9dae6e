"""Encode conversations and their pictures as a base model gets them: token ids, scored tokens, pixels.

The chat template determines the text. Only assistant content and its end token are scored, except where the data
says `"loss": false`.
Nothing is truncated: conversations that are too long are reported.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from qwen_vl_lora.exceptions import BaseModelError, DataFormatError
from qwen_vl_lora.model.pictures import PictureSizer, pixel_inputs
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.conversations import Conversation, ImagePart
from qwen_vl_lora.samples.image_store import ImageStore

Message = dict[str, Any]
_Skeleton = tuple[tuple[str, tuple[str | None, ...]], ...]
"""Role and parts of each turn; a picture is None, as it is in the rendered text."""

_AT_ONCE, _PROMPTS = 256, 1024
"""Conversations that are tokenised together, and rendered prompts that are remembered: many captions share one."""


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

    @property
    def shared_prompt(self) -> tuple[tuple[str, ...], bytes] | None:
        """Equal for conversations that can share a row; None for one that cannot, with a picture after its prompt."""
        length = self.prompt_length
        return None if self.is_image[length:].any() else (self.images, self.ids[:length].tobytes())


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


def _skeleton(conversation: Conversation) -> _Skeleton:
    return tuple(
        (role, tuple(None if isinstance(part, ImagePart) else part.text for part in parts))
        for role, parts in conversation.turns
    )


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
        self.image_token_id = self._tokenizer.convert_tokens_to_ids(processor.image_token)
        self._rendered = functools.lru_cache(_PROMPTS)(self._render)
        self._end_token: str = self._tokenizer.eos_token
        self._question_ids = functools.lru_cache(_PROMPTS)(lambda text: self._tokenise({text})[text])

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """The whole conversation with scored answers."""
        return next(self.encode_all([conversation]))

    def encode_all(self, conversations: Iterable[Conversation]) -> Iterator[EncodedConversation]:
        """As `encode`, one after the other; equal texts of some that stand together are tokenised once."""
        remaining = iter(conversations)
        while some := list(islice(remaining, _AT_ONCE)):
            segments = list(map(self._segments, some))
            ids = self._tokenise({text for pieces in segments for text, _ in pieces})
            for conversation, pieces in zip(some, segments, strict=True):
                yield self._assemble(conversation, pieces, ids)

    def encode_prompt(self, conversation: Conversation) -> EncodedConversation:
        """The conversation up to the last answer, for generation. Nothing is scored."""
        last_role, _ = conversation.turns[-1]
        turns = conversation.turns[:-1] if last_role == "assistant" else conversation.turns
        asked = Conversation(conversation.id, turns)
        text = self._rendered(_skeleton(asked), add_generation_prompt=True)
        return self._assemble(asked, [(text, False)], {text: self._question_ids(text)})

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

    def _render(self, turns: _Skeleton, *, add_generation_prompt: bool) -> str:
        messages: list[Message] = [
            {
                "role": role,
                "content": [{"type": "image"} if text is None else {"type": "text", "text": text} for text in parts],
            }
            for role, parts in turns
        ]
        return render(self.processor, messages, add_generation_prompt=add_generation_prompt)

    def _tokenise(self, texts: Collection[str]) -> dict[str, list[int]]:
        given = list(texts)
        return dict(zip(given, self._tokenizer(given, add_special_tokens=False)["input_ids"], strict=True))

    def _segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered text in pieces, and for each whether it is scored.

        A thinking template takes the empty think block of an answer away when another turn follows. That answer can
        then not be scored: its prompt in training would not be the one it is generated from.
        """
        turns, unscored = _skeleton(conversation), conversation.unscored
        segments: list[tuple[str, bool]] = []
        done = ""
        for position, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            before = self._rendered(turns[:position], add_generation_prompt=True)
            after = self._render(turns[: position + 1], add_generation_prompt=False)
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

    def _assemble(
        self, conversation: Conversation, segments: list[tuple[str, bool]], ids_of: Mapping[str, list[int]]
    ) -> EncodedConversation:
        names, grids = self._pictures(conversation)
        encoded = [ids_of[text] for text, _ in segments]
        ids = np.array([token for piece in encoded for token in piece], dtype=np.int64)
        scored = np.repeat([is_scored for _, is_scored in segments], [len(piece) for piece in encoded])
        slots = np.flatnonzero(ids == self.image_token_id)
        if len(slots) != len(names):
            raise DataFormatError(
                f"Conversation {conversation.id!r} holds {len(names)} pictures, but {len(slots)} image places in its "
                f"text. Remove {self.processor.image_token} from its texts."
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[slots] = [self.sizer.num_tokens(grid) for grid in grids]
        ids = ids.repeat(repeats)
        return EncodedConversation(
            conversation.id, ids, scored.repeat(repeats), ids == self.image_token_id, names, grids
        )

    def _pictures(self, conversation: Conversation) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
        entries = [self.images.by_path(path) for path in conversation.image_paths]
        names = tuple(entry.sha256 for entry in entries)
        return names, tuple(self.sizer.grid(entry.width, entry.height) for entry in entries)
