"""Forms of one JSON record, read into images and turns.

    tutorials   {"id", "conversations": [{"from": "user", "value": "Text <|vision_start|>PATH<|vision_end|>"}, …]}
                {"id", "conversations": [{"role": "user", "value": PATH}, …]}
    LLaVA       {"id", "image": PATH, "conversations": [{"from": "human", "value": "<image>\\nText"}, …]}
    ms-swift    {"images": [PATH, …], "messages": [{"role": "user", "content": "<image>Text"}, …]}
                {"images": [PATH, …], "query": "<image>Text", "response": …, "history": [[query, response], …]}
                {"images": [PATH, …], "conversation": [{"human": "<image>Text", "assistant": …}, …]}
    OpenAI      {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PATH}}, …]}, …]}
    caption     {"image_path": PATH, "caption": …}, as the columns of a CSV

Each may hold a `system` text beside its turns. Turns may also be assistant alone, with an image beside
them: then they are a caption. Images without any place in the turns come before the first question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_lora.samples.conversations import MARKER_END, MARKER_START
from qwen_vl_lora.samples.records import IMAGE_SLOT, Role, RowError, Turn
from qwen_vl_lora.samples.references import id_from_reference, resolve_reference
from qwen_vl_lora.samples.texts import printable

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

MARKED = re.compile(f"{re.escape(MARKER_START)}(.*?){re.escape(MARKER_END)}|<img>(.*?)</img>", re.DOTALL)
"""A path inside a text, between the tutorials' markers or Qwen-VL's older ones."""

_PLACE = re.compile(f"{MARKED.pattern}|{re.escape(IMAGE_SLOT)}", re.DOTALL)
"""Where an image goes: a marker around its path, or a slot for the next of the record's images."""

_BARE_PATH = re.compile(r"(\S+|/.*)\.(jpe?g|png|webp|bmp|gif)", re.IGNORECASE)
"""A user turn that is nothing but a path. A blank in a relative path would make a question of it."""

_QWEN_PAD = "<|image_pad|>"

_NO_PICTURES = ("videos", "video", "audios", "audio")
"""Keys of records that ask about something else than pictures; without it their questions make no sense."""


def read_record(record: Any, row: int, folder: Path) -> tuple[str, tuple[bytes | Path, ...], tuple[Turn, ...]]:
    """Return id, images and turns of a record; relative paths are taken from `folder`.

    Without an id of its own the record gets one from its first image's path, or from its row.

    Raises:
        RowError: when the record is in none of the forms.
    """
    if not isinstance(record, dict):
        raise _malformed(f"A record must be a JSON object; came {_shown(record)}.")
    if other := [key for key in _NO_PICTURES if record.get(key)]:
        raise _malformed(f"The record holds `{other[0]}`, which is not read; only pictures are.")
    beside = _named_images(record)
    named = iter(beside)
    references: list[str] = []
    turns = tuple(_read_turn(message, named, references) for message in _messages(record))
    if not beside and not references:
        turns = _read_bare_path(turns, references)
    unplaced = list(named)
    if unplaced:
        turns = _place_first(turns, len(unplaced))
        references.extend(unplaced)
    images = tuple(resolve_reference(reference.strip(), folder) for reference in references)
    return _record_id(record, references, row, folder), images, turns


def _messages(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Role and content of every turn, whatever the form calls them."""
    system = record.get("system")
    beside = [("system", system)] if isinstance(system, str) and system.strip() else []
    for key in ("conversations", "messages", "conversation"):
        turns = record.get(key)
        if turns is None:
            continue
        if not isinstance(turns, list) or not turns:
            raise _malformed(f"`{key}` must be a list of turns; came {_shown(turns)}.")
        return [*beside, *(message for turn in turns for message in _messages_of_turn(key, turn))]
    if {"query", "response"} <= set(record):
        return [*beside, *_messages_of_query(record)]
    if _is_caption(record):
        return [*beside, ("assistant", record["caption"])]
    raise RowError(
        "missing_key",
        "A record needs `conversations`, `messages`, `query` and `response`, or `image_path` and `caption`; "
        f"it has {_shown(sorted(record))}.",
    )


def _messages_of_turn(key: str, turn: Any) -> list[tuple[Any, Any]]:
    """One turn, or the two that ms-swift's ShareGPT form keeps together."""
    names = set(turn) if isinstance(turn, dict) else set()
    if {"human", "assistant"} <= names:
        return [("user", turn["human"]), ("assistant", turn["assistant"])]
    for role, content in (("from", "value"), ("role", "content"), ("role", "value")):
        if {role, content} <= names:
            return [(turn[role], turn[content])]
    raise RowError(
        "missing_key", f"A turn of `{key}` needs `role` and `content`, or `from` and `value`; came {_shown(turn)}."
    )


def _messages_of_query(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _malformed(f"`history` must be a list of pairs of query and response; came {_shown(history)}.")
    pairs = [*history, [record["query"], record["response"]]]
    return [message for query, response in pairs for message in (("user", query), ("assistant", response))]


def _is_caption(record: dict[str, Any]) -> bool:
    return "caption" in record and any(key in record for key in ("image_path", "image", "images"))


def _read_bare_path(turns: Sequence[Turn], references: list[str]) -> tuple[Turn, ...]:
    """Turns whose first question is nothing but a path, with that image in its place."""
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not _BARE_PATH.fullmatch(turns[first].text.strip()):
        return tuple(turns)
    references.append(turns[first].text)
    return (*turns[:first], Turn("user", IMAGE_SLOT), *turns[first + 1 :])


def _place_first(turns: Sequence[Turn], num_images: int) -> tuple[Turn, ...]:
    """Turns with slots before the first question; as they are when they hold slots of their own, or ask nothing."""
    questions = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not questions or any(IMAGE_SLOT in turns[place].text for place in questions):
        return tuple(turns)  # the count of slots and images is checked with the turns
    first = questions[0]
    return (*turns[:first], Turn("user", IMAGE_SLOT * num_images + turns[first].text), *turns[first + 1 :])


def _named_images(record: dict[str, Any]) -> list[str]:
    """Paths under `images`, `image` or `image_path`, as text or as ms-swift's `{"path": …}` and `{"url": …}`."""
    given = [record[key] for key in ("images", "image", "image_path") if record.get(key) is not None]
    if not given:
        return []
    found = given[0]
    return [_reference_of(image) for image in (found if isinstance(found, list) else [found])]


def _reference_of(image: Any) -> str:
    if isinstance(image, dict):
        image = image.get("url") or image.get("path")
    if not isinstance(image, str):
        raise _malformed(f"An image must be given as the text of its path; came {_shown(image)}.")
    return image


def _read_turn(message: tuple[Any, Any], named: Iterator[str], references: list[str]) -> Turn:
    """Make one turn; the images that stand in it are appended to `references`, in their order."""
    name, content = message
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError("wrong_roles", f"The role {_shown(name)} is none of {', '.join(_ROLES)}.")
    if content is None or content != content:  # NaN alone differs from itself
        raise RowError("empty_caption", f"The {role} turn is {content}.")
    if isinstance(content, list):
        return Turn(role, "".join(_read_item(item, role, named, references) for item in content))
    if not isinstance(content, str):
        raise _malformed(f"The {role} turn must be text or a list of contents; came {_shown(content)}.")
    return Turn(role, _read_text(content, role, named, references))


def _read_item(item: Any, role: Role, named: Iterator[str], references: list[str]) -> str:
    """One of an OpenAI turn's contents: text, or an image, with its own path or the next of the record's."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return _read_text(item["text"], role, named, references)
    if kind in ("image", "image_url") and role == "user":
        given = item.get(kind, item.get("url", item.get("path")))
        references.extend([_reference_of(given)] if given is not None else _next_of(named))
        return IMAGE_SLOT
    raise _malformed(
        f"A {role} turn cannot hold {_shown(item)}; allowed are text and, in user turns, image and image_url."
    )


def _read_text(text: str, role: Role, named: Iterator[str], references: list[str]) -> str:
    if role != "user" or "<" not in text:
        return text

    def to_slot(place: re.Match[str]) -> str:
        path = place.group(1) if place.group(1) is not None else place.group(2)
        references.extend(_next_of(named) if path is None or path.strip() == _QWEN_PAD else [path])
        return IMAGE_SLOT

    return _PLACE.sub(to_slot, text)


def _next_of(named: Iterator[str]) -> list[str]:
    """The next of the record's images; none when they are used up, which the count of slots will show."""
    image = next(named, None)
    return [] if image is None else [image]


def _record_id(record: dict[str, Any], references: list[str], row: int, folder: Path) -> str:
    own = record.get("id")
    if own is None and _is_caption(record):  # as in a CSV, rows of one picture share it
        own = record.get("image_id")
    if isinstance(own, str | int) and not isinstance(own, bool):
        return str(own)
    if own is not None:
        raise RowError("bad_id", f"An id must be text or a whole number; came {_shown(own)}.")
    return (id_from_reference(references[0].strip(), folder) if len(references) == 1 else "") or f"row_{row}"


def _malformed(detail: str) -> RowError:
    return RowError("malformed_row", detail)


def _shown(value: Any) -> str:
    return printable(repr(value))
