"""Classifies keys of records, turns and contents other than texts: honoured, refused by name, or unknown.

This module knows the keys whose meaning would be lost by ignoring them. A key that is neither read elsewhere nor known
here is reported as ignored, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwen_vl_lora.samples.fields import UNUSABLE_FLAGS, USABLE_FLAGS, plain_name
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.references import shown

_PREFERENCES = "preference data (DPO) needs another training method"

UNSUPPORTED = {
    **dict.fromkeys(("video", "videos", "video_url", "audio", "audios", "input_audio"), "only pictures are read"),
    **dict.fromkeys(("objects", "bbox", "bboxes", "boxes"), "boxes of grounding data are not filled into texts"),
    **dict.fromkeys(("rejected", "chosen"), _PREFERENCES),
    **dict.fromkeys(("rejected_response", "rejected_responses", "rejected_messages", "rejected_images"), _PREFERENCES),
    **dict.fromkeys(("tools", "tool_calls", "function_call", "functions"), "tool calls are not trained"),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "reasoning is not trained as part of an answer"),
    "refusal": "a refusal is not an answer",
}
"""Keys of chats whose meaning is known and not supported; an empty value is ignored."""

_UNSUPPORTED_BESIDE_CAPTIONS = ("rejected_response", "rejected_responses", "rejected_messages", "rejected_images")
"""The other keys can describe a picture that has a caption, so they are reported as ignored."""

_UNSUPPORTED_IN_TURNS = dict.fromkeys(
    ("image", "images", "image_url", "image_path", "attachments"),
    "write the pictures beside the turns (`images`) or into the content",
)

SCORE_FLAGS = ("weight", "loss", "loss_scale", "train", "trainable")
"""Flags of a turn: whether its answer is trained."""

PREFERENCE_FLAGS = ("label", "kto_tag")
"""Flags of a record in KTO data: false marks a bad answer."""

Unread = dict[str, None]
"""Keys that are not read, in order."""


def check_record(record: Mapping[str, Any], is_chat: bool, unread: Unread) -> None:
    """Refuse a record with keys that are not supported, or that mark it as unusable.

    A key of such a name with another kind of value, such as a class under `label`, is added to `unread`.

    Raises:
        RowError: `rejected_by_source` or `unsupported_content`.
    """
    for key, value in record.items():
        name = plain_name(key)
        if name in PREFERENCE_FLAGS:
            _check_preference(key, value, is_chat, unread)
        elif name in SCORE_FLAGS:
            _check_score_of_record(key, value, is_chat, unread)
        elif name in UNSUPPORTED and (is_chat or name in _UNSUPPORTED_BESIDE_CAPTIONS) and not is_empty(value):
            raise _unsupported("record", key, UNSUPPORTED[name])
        elif name in UNUSABLE_FLAGS or name in USABLE_FLAGS:
            check_flag(key, value)


def check_turn(turn: Mapping[str, Any], read: Iterable[str], unread: Unread) -> None:
    """Refuse a turn with keys that are not supported; keys that are not read are added to `unread`.

    Raises:
        RowError: `unsupported_content`.
    """
    refused = UNSUPPORTED | _UNSUPPORTED_IN_TURNS
    for key, value in turn.items():
        name = plain_name(key)
        if key in read or name in SCORE_FLAGS or (name in refused and is_empty(value)):
            continue
        if name in refused:
            raise _unsupported("turn", key, refused[name])
        unread[f"{key} (of a turn)"] = None


def check_content(content: Mapping[str, Any], read: Iterable[str], unread: Unread) -> None:
    """Do the same for one of the contents of a turn.

    Raises:
        RowError: `unsupported_content`.
    """
    for key, value in content.items():
        name = plain_name(key)
        if key in read or is_missing(value):
            continue
        if name in UNSUPPORTED or (name in SCORE_FLAGS and not is_true(value)):
            raise _unsupported("content", key, UNSUPPORTED.get(name, "only whole turns can be left unscored"))
        unread[f"{key} (of a content)"] = None


def is_scored(turn: Mapping[str, Any], is_answer: bool) -> bool:
    """Return whether a turn is scored according to its flags; without flags, an answer is scored.

    Raises:
        RowError: when a flag is neither on nor off, flags differ, or a question is marked for training.
    """
    flags = {key: turn[key] for key in turn if plain_name(key) in SCORE_FLAGS and not is_missing(turn[key])}
    if not flags:
        return True
    values = set()
    for key, value in flags.items():
        if value not in (0, 1) or isinstance(value, str):
            raise RowError("unsupported_content", f"`{key}` of a turn is {shown(value)}; expected 0 or 1.")
        values.add(bool(value))
    if len(values) > 1:
        raise RowError("unsupported_content", f"The flags {', '.join(flags)} of a turn contradict each other.")
    if values == {True} and not is_answer:
        raise RowError("unsupported_content", f"The flag {next(iter(flags))} marks a turn that is not an answer.")
    return values.pop()


def check_flag(key: str, value: Any) -> None:
    """Raises: RowError when a flag marks a row as unusable, or is neither true nor false."""
    if is_missing(value) or (isinstance(value, str | list | dict) and (not value or str(value).isspace())):
        return
    if not is_true(value) and not is_false(value):
        raise RowError(
            "unsupported_content",
            f"`{key}` states whether a row may be used; expected true or false, got {shown(value)}. Rename it if it "
            "means something else.",
        )
    if is_true(value) is (plain_name(key) in UNUSABLE_FLAGS):
        raise RowError("rejected_by_source", f"The data set marks the row as unusable: `{key}` is {shown(value)}.")


def is_true(value: Any) -> bool:
    """Whether a flag is set, also if written as text in a table."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "1.0", "yes")
    return value is True or (isinstance(value, int | float) and value == 1)


def is_false(value: Any) -> bool:
    """Whether a flag is present and not set, also if written as text in a table."""
    if isinstance(value, str):
        return value.strip().lower() in ("false", "0", "0.0", "no")
    return value is False or (isinstance(value, int | float) and value == 0)


def is_missing(value: Any) -> bool:
    """Whether a value is None or NaN, which is the only value that differs from itself."""
    return value is None or (isinstance(value, float) and value != value)


def is_empty(value: Any) -> bool:
    """Whether the value of a key is empty."""
    return is_missing(value) or value is False or (isinstance(value, (str, list, dict)) and not value)


def _check_preference(key: str, value: Any, is_chat: bool, unread: Unread) -> None:
    if value is False or (is_chat and is_false(value)):  # beside a caption, 0 is a class number
        raise RowError(
            "unsupported_content", f"`{key}` is {shown(value)}: the answer is marked as bad (KTO); not trained."
        )
    if not is_missing(value) and not (is_chat and is_true(value)):
        unread[key] = None


def _check_score_of_record(key: str, value: Any, is_chat: bool, unread: Unread) -> None:
    if is_missing(value):
        return
    if is_false(value) or (is_chat and not is_true(value)):
        raise RowError("unsupported_content", f"`{key}` of the whole record is {shown(value)}; expected 1.")
    if not is_true(value):
        unread[key] = None  # beside a caption, the weight of what the picture shows


def _unsupported(holder: str, key: str, why: str) -> RowError:
    return RowError("unsupported_content", f"The {holder} has `{key}`: {why}.")
