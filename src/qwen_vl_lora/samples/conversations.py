"""Conversations: the tutorials' JSON form, from samples and back into parts that a chat template takes.

    {"id": "identity_1", "conversations": [
        {"from": "user", "value": "COCO Yes: <|vision_start|>PATH<|vision_end|>"},
        {"from": "assistant", "value": "A dog runs."}]}

A marker may stand anywhere in a user turn, several times, or not at all; a first turn may come
from `system`. This module alone knows the form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import PromptParameters
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.records import IMAGE_SLOT, Role, RowError
from qwen_vl_lora.samples.texts import find_special_token
from qwen_vl_lora.samples.turns import check_order

MARKER_START, MARKER_END = "<|vision_start|>", "<|vision_end|>"

_MARKER = re.compile(f"{re.escape(MARKER_START)}(.*?){re.escape(MARKER_END)}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture of a turn, by its path in the image store."""

    path: str


Part = TextPart | ImagePart
Message = tuple[Role, tuple[Part, ...]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the chat template wants it: roles with parts in the order in which they are fed."""

    id: str
    turns: tuple[Message, ...]

    @property
    def image_paths(self) -> tuple[str, ...]:
        """Paths of the pictures in the order in which they are fed."""
        return tuple(part.path for _, parts in self.turns for part in parts if isinstance(part, ImagePart))


def build_conversations(
    samples: Sequence[Mapping[str, Any]], images: ImageStore, prompt: PromptParameters
) -> list[dict[str, Any]]:
    """Write samples in the tutorials' form; `identity_7` is the seventh row of the source.

    A sample without a user turn is asked `prompt.user`, its images behind it. A sample's own texts
    win unless `prompt.override` is set: then every user turn asks `prompt.user`, with that turn's
    images behind it, and the system turn is `prompt.system` or none.

    Raises:
        DataFormatError: when a sample names an image that `images` does not hold.
    """
    return [
        {"id": f"identity_{sample['row']}", "conversations": _messages(sample, images, prompt)} for sample in samples
    ]


def row_of(conversation_id: str) -> int:
    """The row of the source that a conversation comes from; 0 for one that was not written by `build_conversations`."""
    numbered = re.fullmatch(r"identity_(\d{1,15})", conversation_id, re.ASCII)
    return int(numbered[1]) if numbered else 0


def parse_conversation(record: Any) -> Conversation:
    """Read one conversation.

    When all markers of a turn stand at its end behind text, as the tutorials write it, or at its
    start, as LLaVA does, the images come first and then the text without edge blanks: so Qwen's own
    examples feed them. Otherwise the parts keep their places.

    Raises:
        DataFormatError: naming the record, when it is not in the form above.
    """
    record_id = record.get("id") if isinstance(record, Mapping) else None
    if not isinstance(record_id, str) or not record_id:
        raise DataFormatError(f'A conversation must be a mapping with a text under "id"; came {str(record)[:200]}.')
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        _refuse(record_id, 'needs a list of turns under "conversations"')
    turns = tuple(_parse_message(record_id, message) for message in messages)
    try:
        check_order([role for role, _ in turns])
    except RowError as fault:
        _refuse(record_id, f"has turns in the wrong order: {fault.detail}")
    if all(role != "user" for role, _ in turns):
        _refuse(record_id, "has no user turn")
    return Conversation(record_id, turns)


def ask_about(path: str, prompt: PromptParameters) -> Conversation:
    """What `build_conversations` and `parse_conversation` make of a captioned image, before its answer.

    Raises:
        DataFormatError: when the prompt holds what stands for something else, such as a marker.
    """
    asked = [] if prompt.system is None else [{"from": "system", "value": prompt.system}]
    asked.append({"from": "user", "value": _question(prompt, [image_marker(path)])})
    return Conversation(path, tuple(_parse_message(path, message) for message in asked))


def image_marker(path: str) -> str:
    """The marker that stands for an image in a text."""
    return f"{MARKER_START}{path}{MARKER_END}"


def _messages(sample: Mapping[str, Any], images: ImageStore, prompt: PromptParameters) -> list[dict[str, str]]:
    markers = iter([image_marker(images.by_sha256(sha256).path) for sha256 in sample["images"]])
    turns: list[dict[str, str]] = sample["turns"]
    system = prompt.system
    if not prompt.override:
        own = [turn["text"] for turn in turns if turn["role"] == "system"]
        asks_itself = any(turn["role"] == "user" for turn in turns)
        system = own[0] if own else None if asks_itself else prompt.system
    messages = [] if system is None else [{"from": "system", "value": system}]
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if len(spoken) == 1:
        messages.append({"from": "user", "value": _question(prompt, markers)})
    for turn in spoken:
        value = turn["text"] if turn["role"] == "assistant" else _user_text(turn["text"], markers, prompt)
        messages.append({"from": turn["role"], "value": value})
    return messages


def _question(prompt: PromptParameters, markers: Iterable[str]) -> str:
    return " ".join([prompt.user, *markers])


def _user_text(text: str, markers: Iterator[str], prompt: PromptParameters) -> str:
    if prompt.override:
        return _question(prompt, islice(markers, text.count(IMAGE_SLOT)))
    first, *others = text.split(IMAGE_SLOT)
    return first + "".join(f"{next(markers)}{piece}" for piece in others)


def _parse_message(record_id: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or set(message) != {"from", "value"}:
        _refuse(record_id, f'needs turns of the form {{"from": …, "value": …}}; came {str(message)[:200]}')
    role, value = message["from"], message["value"]
    if role not in ("system", "user", "assistant"):
        _refuse(record_id, f'has a turn from {str(role)[:50]!r}; "from" must be system, user or assistant')
    if not isinstance(value, str) or not value.strip():
        _refuse(record_id, f"has an empty {role} turn")
    parts = _parts(value)
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        _refuse(record_id, f"has an image in its {role} turn; images belong to user turns")
    for part in parts:
        _check_part(record_id, part)
    return role, parts


def _parts(value: str) -> tuple[Part, ...]:
    # re.split with one group alternates text, path, text, path, …, text.
    texts, paths = _MARKER.split(value)[::2], _MARKER.split(value)[1::2]
    inner_texts = texts[1:-1]
    if paths and not any(text.strip() for text in inner_texts) and not (texts[0].strip() and texts[-1].strip()):
        text = "".join(texts).strip()
        return (*map(ImagePart, paths), *([TextPart(text)] if text else []))
    parts: list[Part] = []
    for place, text in enumerate(texts):
        if text:
            parts.append(TextPart(text))
        if place < len(paths):
            parts.append(ImagePart(paths[place]))
    return tuple(parts)


def _check_part(record_id: str, part: Part) -> None:
    if isinstance(part, ImagePart):
        if not part.path.strip() or find_special_token(part.path):
            _refuse(record_id, f"has an image marker around {part.path[:200]!r}, which is no path")
        return
    token = find_special_token(part.text)
    if token is not None:
        _refuse(
            record_id,
            f"holds {token} in a text; {MARKER_START} and {MARKER_END} stand in pairs around a path, others never",
        )


def _refuse(record_id: str, fault: str) -> NoReturn:
    raise DataFormatError(
        f"Conversation {record_id[:100]!r} {fault}. Write conversations with the data_engineering pipeline, "
        "or as `qwen_vl_lora.samples.conversations` describes them."
    )
