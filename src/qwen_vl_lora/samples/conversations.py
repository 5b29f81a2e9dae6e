"""Conversations in the tutorials' JSON form: written from samples, and parsed into parts for a chat template.

    {"id": "identity_1", "conversations": [
        {"from": "user", "value": "COCO Yes: <|vision_start|>PATH<|vision_end|>"},
        {"from": "assistant", "value": "A dog runs."}]}

A user turn may contain markers anywhere, any number of times; the first turn may be from `system`.
An answer with `"loss": false` is context and not trained. Only this module knows the form.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NoReturn, overload

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import PromptParameters
from qwen_vl_lora.runs.artifacts import digest_of_list
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.record_files import Records
from qwen_vl_lora.samples.records import IMAGE_SLOT, Role, RowError
from qwen_vl_lora.samples.texts import find_special_token
from qwen_vl_lora.samples.turns import check_order

MARKER_START, MARKER_END = "<|vision_start|>", "<|vision_end|>"

_NEAR = 2**16
"""Rows that may be missing between two numbers before a row is counted by itself."""

_MARKER = re.compile(f"{re.escape(MARKER_START)}(.*?){re.escape(MARKER_END)}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text of a turn."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture of a turn, by its path in the image store."""

    path: str


Part = TextPart | ImagePart
Message = tuple[Role, tuple[Part, ...]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation for the chat template: roles with parts in the order of the model's input."""

    id: str
    turns: tuple[Message, ...]
    unscored: frozenset[int] = frozenset()
    """Indices in `turns` of answers that are not trained."""

    @property
    def image_paths(self) -> tuple[str, ...]:
        """Paths of the pictures in the order of the model's input."""
        return tuple(part.path for _, parts in self.turns for part in parts if isinstance(part, ImagePart))


class Conversations(Sequence[Conversation]):
    """Conversations in their stored form. A node or command makes it from what the catalog loaded.

    `Records` of a file are parsed each time that they are asked for, so that they are never in memory together; other
    records once, at first.

    Args:
        records: in the form above.

    Raises:
        DataFormatError: naming the first record without that form; for `Records`, when it is asked for.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = records if isinstance(records, Records) else list(records)
        self._parsed = None if isinstance(records, Records) else tuple(map(parse_conversation, self.records))

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if self._parsed is not None:
            return self._parsed[index]
        if isinstance(index, slice):
            return tuple(map(parse_conversation, self.records[index]))
        return parse_conversation(self.records[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(parse_conversation, self.records) if self._parsed is None else iter(self._parsed)

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the stored form, independent of the order of keys."""
        return digest_of_list(self.records)

    @cached_property
    def stored_sha256(self) -> str:
        """Hex sha256 of the file that holds them, which takes no parsing; `sha256` if there is none."""
        whole = self.records.file_sha256() if isinstance(self.records, Records) else None
        return whole or self.sha256


@dataclass(frozen=True)
class ConversationsOf(Iterable[dict[str, Any]]):
    """What `build_conversations` returns of these samples, made one by one each time that it is read."""

    samples: Iterable[Mapping[str, Any]]
    images: ImageStore
    prompt: PromptParameters

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows: dict[str | None, _Rows] = {}
        for sample in self.samples:
            source, row = sample.get("source"), sample["row"]
            name = f"identity_{row}" if source is None else f"{source}:{row}"
            number = rows.setdefault(source, _Rows()).count(row)
            if number > 1:
                name = f"{name}_{number}"
            split = {"split": sample["split"]} if "split" in sample else {}
            paths = [self.images.by_sha256(sha256).path for sha256 in sample["images"]]
            yield {"id": name, "conversations": _messages(sample, paths, self.prompt), **split}


class _Rows:
    """How often each row of a source occurred, in 4 bytes a row where they are numbered one after the other."""

    def __init__(self) -> None:
        self._numbers = array("I")
        self._far: Counter[int] = Counter()

    def count(self, row: int) -> int:
        """Return the number of times that the row was counted, with this one."""
        if row in self._far or not 0 <= row < len(self._numbers) + _NEAR:
            self._far[row] += 1
            return self._far[row]
        if row >= len(self._numbers):
            self._numbers.extend(bytes(row + 1 - len(self._numbers)))
        self._numbers[row] += 1
        return self._numbers[row]


def build_conversations(
    samples: Iterable[Mapping[str, Any]], images: ImageStore, prompt: PromptParameters
) -> list[dict[str, Any]]:
    """Write samples in the tutorials' form; `identity_7` is the seventh row of the source, `identity_7_2` its second
    caption. With several sources the id contains the source's name: `coco:7`.

    A sample without a user turn gets `prompt.user`, with its pictures after the text. A sample's own texts
    take precedence unless `prompt.override` is set: then every user turn is `prompt.user`, with the pictures of
    that turn after it, and the system turn is `prompt.system` or absent. `<image>` in `prompt.user` sets the
    places of the pictures.

    Raises:
        DataFormatError: when a sample names a picture that is not in `images`, or the number of `<image>` in
            `prompt.user` differs from the number of pictures of a turn.
    """
    return list(ConversationsOf(samples, images, prompt))


def ask_alike(samples: Iterable[Mapping[str, Any]], one: PromptParameters, other: PromptParameters) -> bool:
    """Whether two prompts give the same conversations of these samples, which may have texts of their own."""
    return all(
        _messages(sample, sample["images"], one) == _messages(sample, sample["images"], other) for sample in samples
    )


def row_of(conversation_id: str) -> int:
    """Return the source row of a conversation; 0 if `build_conversations` did not write it."""
    numbered = re.fullmatch(r"(?:identity_|[^:]+:)(\d{1,15})(?:_\d+)?", conversation_id, re.ASCII)
    return int(numbered[1]) if numbered else 0


def parse_conversation(record: Any) -> Conversation:
    """Parse one conversation.

    If all markers of a turn are at its end after text, as in the tutorials, or at its start, as in
    LLaVA, the pictures come first and then the text without edge blanks, as in Qwen's examples.
    Otherwise the parts keep their places.

    Raises:
        DataFormatError: naming the record, when it does not have the form above.
    """
    record_id = record.get("id") if isinstance(record, Mapping) else None
    if not isinstance(record_id, str) or not record_id:
        raise DataFormatError(f'A conversation must be a mapping with a text under "id"; got {str(record)[:200]}.')
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
    unscored = (place for place, message in enumerate(messages) if message.get("loss") is False)
    return Conversation(record_id, turns, frozenset(unscored))


def ask_about(path: str, prompt: PromptParameters, pictures: int = 1) -> Conversation:
    """Return the turns before the answer that `build_conversations` and `parse_conversation` give for a picture.

    Args:
        pictures: how often it is shown.

    Raises:
        DataFormatError: when the prompt contains a marker or another reserved text, or places for other pictures.
    """
    asked = [] if prompt.system is None else [{"from": "system", "value": prompt.system}]
    asked.append({"from": "user", "value": _question(prompt, [image_marker(path)] * pictures)})
    return Conversation(path, tuple(_parse_message(path, message) for message in asked))


def image_marker(path: str) -> str:
    """Return the marker of a picture in a text."""
    return f"{MARKER_START}{path}{MARKER_END}"


def _messages(sample: Mapping[str, Any], paths: Iterable[str], prompt: PromptParameters) -> list[dict[str, Any]]:
    markers = map(image_marker, paths)
    turns: list[dict[str, Any]] = sample["turns"]
    system = prompt.system
    if not prompt.override:
        own = [turn["text"] for turn in turns if turn["role"] == "system"]
        asks_itself = any(turn["role"] == "user" for turn in turns)
        system = own[0] if own else None if asks_itself else prompt.system
    messages: list[dict[str, Any]] = [] if system is None else [{"from": "system", "value": system}]
    spoken = [turn for turn in turns if turn["role"] != "system"]
    if len(spoken) == 1:
        messages.append({"from": "user", "value": _question(prompt, list(markers))})
    for turn in spoken:
        value = turn["text"] if turn["role"] == "assistant" else _user_text(turn["text"], markers, prompt)
        unscored = {"loss": False} if turn.get("loss") is False else {}
        messages.append({"from": turn["role"], "value": value, **unscored})
    return messages


def _question(prompt: PromptParameters, markers: Sequence[str]) -> str:
    slots = prompt.user.count(IMAGE_SLOT)
    if not slots:
        return " ".join([prompt.user, *markers])
    if slots != len(markers):
        raise DataFormatError(
            f"The prompt {prompt.user[:200]!r} has {slots} {IMAGE_SLOT} for {len(markers)} pictures. Make the two "
            f"numbers equal, or omit {IMAGE_SLOT}: the pictures then come before the text."
        )
    return _fill(prompt.user, iter(markers))


def _user_text(text: str, markers: Iterator[str], prompt: PromptParameters) -> str:
    if prompt.override:
        return _question(prompt, list(islice(markers, text.count(IMAGE_SLOT))))
    return _fill(text, markers)


def _fill(text: str, markers: Iterator[str]) -> str:
    first, *others = text.split(IMAGE_SLOT)
    return first + "".join(f"{next(markers)}{piece}" for piece in others)


def _parse_message(record_id: str, message: Any) -> Message:
    if not isinstance(message, Mapping) or set(message) - {"loss"} != {"from", "value"}:
        _refuse(record_id, f'needs turns of the form {{"from": …, "value": …}}; got {str(message)[:200]}')
    role, value = message["from"], message["value"]
    if "loss" in message and (role != "assistant" or message["loss"] is not False):
        _refuse(record_id, f'has a {str(role)[:50]} turn with "loss": {message["loss"]!r}; only answers may have false')
    if role not in ("system", "user", "assistant"):
        _refuse(record_id, f'has a turn from {str(role)[:50]!r}; "from" must be system, user or assistant')
    if not isinstance(value, str) or not value.strip():
        _refuse(record_id, f"has an empty {role} turn")
    parts = _parts(value)
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        _refuse(record_id, f"has a picture in its {role} turn; pictures belong to user turns")
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
            _refuse(record_id, f"has a picture marker around {part.path[:200]!r}, which is not a path")
        return
    token = find_special_token(part.text)
    if token is not None:
        _refuse(
            record_id,
            f"contains {token} in a text; allowed are {MARKER_START} and {MARKER_END} in pairs around a path",
        )


def _refuse(record_id: str, fault: str) -> NoReturn:
    raise DataFormatError(
        f"Conversation {record_id[:100]!r} {fault}. Write conversations with the data_engineering pipeline, "
        "or as `qwen_vl_lora.samples.conversations` describes them."
    )
