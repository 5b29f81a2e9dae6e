"""JSON files that strangers wrote: read whole and plainly, or refused with a cause in words.

Python's parser takes the last of two equal keys, NaN, and a nesting that ends whoever walks through it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from qwen_vl_lora.exceptions import QwenVLLoraError

MAX_DEPTH = 100
"""Levels of lists and objects within each other; real records and configurations have fewer than ten."""

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")

MAX_BYTES = 1 << 28
"""Of one JSON file; the largest real one, a tokenizer, has about 2^24."""


def read_json(path: Path) -> Any:
    """The content of a regular file of UTF-8 JSON.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        ValueError: with the cause, if it is anything else than one plain JSON value.
    """
    return parse_json(read_regular(path, MAX_BYTES))


def read_object(path: Path, error: type[QwenVLLoraError], remedy: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        QwenVLLoraError: `error`, with the cause and the remedy, if it is anything else.
    """
    try:
        content = read_json(path)
    except ValueError as fault:
        raise error(f"{path} cannot be used: {fault}. {remedy}") from fault
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object; got {type(content).__name__}. {remedy}")
    return content


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. Never waits: a FIFO or device is refused and not opened.

    Raises:
        FileNotFoundError: if there is nothing of this name.
        ValueError: if it is no regular file, or a larger one.
    """
    status = os.stat(path)  # noqa: PTH116  Path.stat is the same; os.stat says the errno of a loop of links
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"expected a regular file, got {kind_of(status.st_mode)}")
    if status.st_size > max_bytes:
        raise ValueError(f"expected at most {max_bytes} bytes, got {status.st_size}")
    return path.read_bytes()


def kind_of(mode: int) -> str:
    """What a path is that is no regular file, from its `st_mode`."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def parse_json(data: bytes | str) -> Any:
    """One JSON value.

    Raises:
        ValueError: with the cause: no UTF-8, no JSON, a key twice, NaN or infinity, nested too deeply.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        tree = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    if is_deep(tree):
        raise ValueError(_too_deep())
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(tree, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it has half a character (an unpaired surrogate)") from error
    return tree


def is_deep(tree: Any) -> bool:
    """Whether lists and objects lie within each other at more than `MAX_DEPTH` levels."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _too_deep() -> str:
    return f"it is nested more than {MAX_DEPTH} levels deep"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:100]!r} occurs twice in one object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")
