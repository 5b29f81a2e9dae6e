"""Interprets values of records and cells: captions, ids, splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_vl_lora.samples.meanings import Unread, check_record
from qwen_vl_lora.samples.records import RowError, Split
from qwen_vl_lora.samples.references import shown
from qwen_vl_lora.samples.texts import texts_of_cell

_SPLITS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    "test": "test",
}

_OF_KARPATHY = ("tokens", "imgid", "sentid")
"""Keys of Karpathy's sentences that carry nothing besides the text."""


def captions_of(values: Sequence[Any], unread: Unread) -> list[str]:
    """Return the captions in the values of a row: texts, lists of texts, or lists written as text.

    An empty one among several is omitted. Keys of Karpathy's sentences that are not read are added to `unread`.

    Raises:
        RowError: `empty_caption`, `malformed_row`, or the reason that the flags of a sentence give.
    """
    texts: list[str] = []
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, dict):  # Karpathy's sentences
                check_record(text, False, unread)
                key = "raw" if "raw" in text else "caption"
                unread.update((f"{other} (of a caption)", None) for other in text if other not in (key, *_OF_KARPATHY))
                text = text.get(key)
            if text is None or text != text:  # only NaN differs from itself
                continue
            if not isinstance(text, str):
                raise malformed(f"A caption must be a text; got {shown(text)}.")
            texts.extend(texts_of_cell(text) or [text])
    if not texts:
        raise RowError("empty_caption", f"The caption is {shown(values[0] if len(values) == 1 else list(values))}.")
    return [text for text in texts if text.strip()] or texts[:1] if len(texts) > 1 else texts


def id_of(value: Any) -> str:
    """Return an id as text; empty if there is none. pandas turns whole numbers beside missing ones into floats.

    Raises:
        RowError: `bad_id`.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    raise RowError("bad_id", f"An id must be a text or a whole number; got {shown(value)}.")


def split_of(value: Any) -> Split:
    """Raises: RowError `unknown_split`."""
    split = _SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise RowError("unknown_split", f"The split is {shown(value)}; expected train, validation or test.")
    return split


def malformed(detail: str) -> RowError:
    """Return the error for a value of an unexpected kind."""
    return RowError("malformed_row", detail)
