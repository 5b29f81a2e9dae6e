"""Addresses of pictures, carried as paths through code that knows files alone.

An address becomes `/url:/<percent-encoded address>`: a place that no file of a project has, that
needs no memory to turn back, and whose bytes only a `Fetcher` can give. Whoever writes such a path
into his own table gains nothing: it is fetched, or refused, by the same rules.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

_ROOT = "/url:/"
_ADDRESS = re.compile(r"https?://[^\s\ud800-\udfff]+", re.IGNORECASE)
"""Not with bytes that were no UTF-8: such a reference stays what it is, and its row is rejected for that."""
_IMAGE_KEYS = ("image", "images", "image_path", "image_url", "url", "path")
_MAX_DEPTH = 8
"""Deeper than any form of a record nests an image."""


def path_of_address(address: str) -> Path:
    """The path that stands for an http or https address."""
    return Path(_ROOT) / quote(address, safe="")


def address_of_path(path: str) -> str | None:
    """The address that a path stands for; None for the path of a file."""
    return unquote(path.removeprefix(_ROOT)) if path.startswith(_ROOT) else None


def replace_address(reference: str) -> str:
    """The path that stands for a reference that is an address; any other reference as it is."""
    address = reference.strip()
    return str(path_of_address(address)) if _ADDRESS.fullmatch(address) else reference


def replace_addresses(record: Any, marked: re.Pattern[str]) -> Any:
    """A JSON record with paths in the place of addresses, wherever a record names an image.

    Args:
        record: of any form; texts that merely mention an address stay as they are.
        marked: an image inside a text, the reference in whichever group matched.
    """
    return _replace(record, "", marked, 0)


def _replace(value: Any, key: str, marked: re.Pattern[str], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return value
    if isinstance(value, dict):
        return {name: _replace(inner, name, marked, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replace(inner, key, marked, depth + 1) for inner in value]
    if not isinstance(value, str):
        return value
    return replace_address(value) if key in _IMAGE_KEYS else marked.sub(_replace_marked, value)


def _replace_marked(match: re.Match[str]) -> str:
    group = match.lastindex or 0
    start, end = match.start(group) - match.start(), match.end(group) - match.start()
    return f"{match.group()[:start]}{replace_address(match.group(group))}{match.group()[end:]}"
