"""Forms of one JSON record, read into images and turns.

    tutorials   {"id", "conversations": [{"from": "user", "value": "Text <|vision_start|>PATH<|vision_end|>"}, …]}
    LLaVA       {"id", "image": PATH, "conversations": [{"from": "human", "value": "<image>\\nText"}, …]}
    ms-swift    {"images": [PATH, …], "messages": [{"role": "user", "content": "<image>Text"}, …]}
    OpenAI      {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PATH}}, …]}, …]}

Turns may also be assistant alone, with an image beside them: then they are a caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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

_PLACE = re.compile(f"{re.escape(MARKER_START)}(.*?){re.escape(MARKER_END)}|{re.escape(IMAGE_SLOT)}", re.DOTALL)
"""Where an image goes: a marker around its path, or a slot for the next of the record's images."""

_OTHERS_PLACE = re.compile(r"<img>.*?</img>", re.DOTALL)
"""Of the first Qwen-VL: as plain text the question would lose its picture without a word."""

_QWEN_PAD = "<|image_pad|>"


def read_record(record: Any, row: int, folder: Path) -> tuple[str, tuple[bytes | Path, ...], tuple[Turn, ...]]:
    """Return id, images and turns of a record; relative paths are taken from `folder`.

    Without an id of its own the record gets one from its first image's path, or from its row.

    Raises:
        RowError: when the record is in none of the forms.
    """
    if not isinstance(record, dict):
        raise _malformed(f"A record must be a JSON object; came {_shown(record)}.")
    named = iter(_named_images(record))
    references: list[str] = []
    turns = tuple(_read_turn(message, named, references) for message in _messages(record))
    references.extend(named)  # more images than slots: the count is checked with the turns
    images = tuple(resolve_reference(reference.strip(), folder) for reference in references)
    return _record_id(record, references, row, folder), images, turns


def _messages(record: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Role and content of every turn, whatever the form calls them."""
    for key, role, content in (("conversations", "from", "value"), ("messages", "role", "content")):
        turns = record.get(key)
        if turns is None:
            continue
        if not isinstance(turns, list) or not turns:
            raise _malformed(f"`{key}` must be a list of turns; came {_shown(turns)}.")
        for turn in turns:
            if not isinstance(turn, dict) or not {role, content} <= set(turn):
                raise RowError("missing_key", f"A turn of `{key}` needs `{role}` and `{content}`; came {_shown(turn)}.")
        return [(turn[role], turn[content]) for turn in turns]
    raise RowError("missing_key", f"A record needs `conversations` or `messages`; it has {_shown(sorted(record))}.")


def _named_images(record: dict[str, Any]) -> list[str]:
    """Paths under `image` or `images`, as text or as ms-swift's `{"path": …}` and `{"url": …}`."""
    found = record.get("image") if record.get("images") is None else record["images"]
    if found is None:
        return []
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
    if _OTHERS_PLACE.search(text):
        raise RowError(
            "placeholder_mismatch",
            f"The text holds <img>…</img>, which is another program's form. Write {IMAGE_SLOT}, the picture beside.",
        )

    def to_slot(place: re.Match[str]) -> str:
        path = place.group(1)
        references.extend(_next_of(named) if path is None or path.strip() == _QWEN_PAD else [path])
        return IMAGE_SLOT

    return _PLACE.sub(to_slot, text)


def _next_of(named: Iterator[str]) -> list[str]:
    """The next of the record's images; none when they are used up, which the count of slots will show."""
    image = next(named, None)
    return [] if image is None else [image]


def _record_id(record: dict[str, Any], references: list[str], row: int, folder: Path) -> str:
    own = record.get("id")
    if isinstance(own, str | int) and not isinstance(own, bool):
        return str(own)
    if own is not None:
        raise RowError("bad_id", f"An id must be text or a whole number; came {_shown(own)}.")
    return (id_from_reference(references[0].strip(), folder) if len(references) == 1 else "") or f"row_{row}"


def _malformed(detail: str) -> RowError:
    return RowError("malformed_row", detail)


def _shown(value: Any) -> str:
    return printable(repr(value))
