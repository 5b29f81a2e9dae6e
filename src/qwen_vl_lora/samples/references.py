"""References to pictures in files: paths, URLs, file:// and data: URIs, base64, and objects that contain one."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from qwen_vl_lora.samples.records import Address, Reference, RowError
from qwen_vl_lora.samples.source import Reading
from qwen_vl_lora.samples.texts import printable

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
"""At least two letters: one letter and a colon is a Windows drive."""

_ADDRESS = re.compile(r"https?://[^\s\ud800-\udfff]+", re.IGNORECASE)
"""Excludes bytes that are not UTF-8: such a reference is kept unchanged, and its row is rejected."""

_BASE64_PICTURE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3A-P])[A-Za-z0-9+/\s]{40,}={0,2}\s*")
"""Start of JPEG, PNG, GIF, WebP and BMP in base64. A path is never that long without a dot."""

_PLAIN_PATH = re.compile(r"(?:[\w-][\w. -]*/)*[\w-][\w. -]{0,99}\.[A-Za-z]{2,5}")
"""Matches most references: a plain relative path that needs no processing."""

_HOLDING_KEYS = ("bytes", "base64", "data", "path", "url", "image_url", "file_name", "image", "source")
"""Keys of an object that describes a picture, in order of precedence."""

_KINDS = ("type", "media_type", "mime_type", "format")
"""Keys of such an object that state the kind of bytes; they are ignored, because the bytes state it."""

_MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Place:
    """How the references of a source are resolved.

    Attributes:
        folder: relative paths start here.
        read_addresses: accept https URLs; otherwise their rows are rejected.
        bucket: `s3://name` of the bucket whose addresses are accepted.
    """

    folder: Path
    read_addresses: bool = False
    bucket: str | None = None

    @classmethod
    def of(cls, folder: Path, reading: Reading) -> Self:
        """Create it from what a source knows."""
        return cls(folder, reading.read_addresses, reading.bucket)

    def resolve(self, reference: Any, depth: int = 0) -> Reference:
        """Return the picture that a value names, in any of the supported ways.

        Whether a path may be read is checked elsewhere.

        Raises:
            RowError: `url_not_allowed`, `missing_image`, `bad_encoding`, `damaged_image` or `malformed_row`.
        """
        if isinstance(reference, bytes):
            return reference
        if isinstance(reference, dict) and depth < _MAX_DEPTH:
            return self._resolve_object(reference, depth)
        if not isinstance(reference, str):
            raise RowError("malformed_row", f"A picture must be a path, a URL or bytes; got {shown(reference)}.")
        return self._resolve_text(reference.strip())

    def _resolve_object(self, given: dict[str, Any], depth: int) -> Reference:
        """Resolve an object such as `{"bytes": …, "path": null}`, `{"url": …}` or `{"type": "base64", "data": …}`."""
        for key in _HOLDING_KEYS:
            value = given.get(key)
            if value is None or value == "":
                continue
            if key in ("bytes", "base64", "data") and isinstance(value, str):
                return _decode_base64(value.partition(",")[2] if value.startswith("data:") else value)
            return self.resolve(value, depth + 1)
        raise RowError("missing_image", f"The object names no picture: {shown(given)}.")

    def _resolve_text(self, reference: str) -> Reference:
        if plain := _plain_path(self.folder, reference):
            return plain[0]
        if not reference:
            raise RowError("missing_image", "The row names no picture.")
        if not reference.isascii() and any("\ud800" <= character <= "\udfff" for character in reference):
            raise RowError("bad_encoding", f"The path {printable(reference)} is not UTF-8. Save the source as UTF-8.")
        scheme = _SCHEME.match(reference)
        if scheme is None:
            return _decode_base64(reference) if _BASE64_PICTURE.fullmatch(reference) else self.folder / reference
        match scheme.group(1).lower():
            case "file":
                return self.folder / _path_of_file_uri(reference)
            case "data":
                return _bytes_of_data_uri(reference)
            case "http" | "https" if _ADDRESS.fullmatch(reference) and self.read_addresses:
                return Address(reference)
            case "http" | "https":
                raise RowError(
                    "url_not_allowed",
                    f"{printable(reference)} is a URL, and fetching URLs is disabled. Set "
                    "image.allow_urls: true and list the hosts in image.url_hosts, or download it and give its path.",
                )
            case "s3" if self.bucket is not None and reference.startswith(f"{self.bucket}/"):
                return Address(reference)
            case _ if "://" in reference or reference.lower().startswith("ftp:"):
                raise RowError(
                    "url_not_allowed",
                    f"{printable(reference)} is not a local path, and only https URLs can be fetched. Download it "
                    "and give its path.",
                )
        return self.folder / reference  # a colon in a file name


def unread_keys(reference: Any) -> list[str]:
    """Return keys that are not read of an object that describes a picture; none for other references."""
    if not isinstance(reference, dict):
        return []
    held = [key for key in _HOLDING_KEYS if reference.get(key) not in (None, "", b"")]
    read = {*held[:1], *_KINDS, *(["path"] if held[:1] == ["bytes"] else [])}  # beside bytes, the path is only a name
    inner = unread_keys(reference[held[0]]) if held else []
    return [*(str(key) for key, value in reference.items() if key not in read and value is not None), *inner]


def id_from_reference(reference: Any, folder: Path) -> str:
    """Return an id for a picture without one: its path below `folder`, with `__` for slashes; empty without a path.

    The bare file name is not used, because pictures in different folders may share it.
    """
    if isinstance(reference, dict):
        named = (reference.get(key) for key in ("path", "file_name", "url", "image_url"))
        reference = next((value for value in named if isinstance(value, str)), None)
    if not isinstance(reference, str):
        return ""
    reference = reference.strip()
    if plain := _plain_path(folder, reference):
        return plain[1]
    scheme = _SCHEME.match(reference)
    if scheme is not None and scheme.group(1).lower() == "data":
        return ""
    if scheme is None and _BASE64_PICTURE.fullmatch(reference):
        return ""
    path = os.path.normpath(_path_of_file_uri(reference)) if reference else ""
    if path.startswith("/") and path.startswith(f"{folder}{os.sep}"):
        path = os.path.relpath(path, folder)
    return path.strip("/").replace("\\", "/").replace("/", "__")


@functools.lru_cache(maxsize=1024)
def _plain_path(folder: Path, reference: str) -> tuple[Path, str] | None:
    """Return path and id of a plain reference. Cached: rows that share a picture are adjacent, and paths are slow."""
    return (folder / reference, reference.replace("/", "__")) if _PLAIN_PATH.fullmatch(reference) else None


def _path_of_file_uri(reference: str) -> str:
    if not reference.lower().startswith("file:"):
        return reference
    path = reference[len("file:") :]
    if path.startswith("//"):
        path = path[2:].removeprefix("localhost")
    return unquote(path)


def _bytes_of_data_uri(reference: str) -> bytes:
    head, _, payload = reference.partition(",")
    if not head.lower().endswith(";base64"):
        raise RowError("damaged_image", "A data: URI must contain base64.")
    return _decode_base64(payload)


def _decode_base64(payload: str) -> bytes:
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("damaged_image", f"The picture is not valid base64: {error}.") from error


def shown(value: Any) -> str:
    """Return a value for a message: short, on one line."""
    return printable(repr(value))
