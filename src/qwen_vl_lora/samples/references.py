"""References to images as files write them: paths, file:// and data: URIs, and URLs, which are refused."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path
from urllib.parse import unquote

from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import printable

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")
"""Two letters at least: one letter and a colon is a Windows drive."""


def resolve_reference(reference: str, folder: Path) -> bytes | Path:
    """Return the image that a reference names: a path, relative ones below `folder`, or the bytes of a data: URI.

    Whether the path may be read is not decided here.

    Raises:
        RowError: `url_not_allowed`, `missing_image`, `bad_encoding` or `damaged_image`.
    """
    if not reference:
        raise RowError("missing_image", "The row names no image.")
    if not reference.isascii() and any("\ud800" <= character <= "\udfff" for character in reference):
        raise RowError("bad_encoding", f"The path {printable(reference)} is not UTF-8. Save the source as UTF-8.")
    scheme = _SCHEME.match(reference)
    if scheme is None:
        return folder / reference
    match scheme.group(1).lower():
        case "file":
            return folder / _path_of_file_uri(reference)
        case "data":
            return _bytes_of_data_uri(reference)
        case _ if "://" in reference or reference.lower().startswith(("http:", "https:", "ftp:")):
            raise RowError(
                "url_not_allowed",
                f"{printable(reference)} is a URL; only files are read. Download it and give its path.",
            )
    return folder / reference  # a colon in a file's name


def id_from_reference(reference: str, folder: Path) -> str:
    """An id for an image without one: its path below `folder`, slashes as `__`.

    Not the bare file name, which pictures in different folders may share.
    """
    scheme = _SCHEME.match(reference)
    if scheme is not None and scheme.group(1).lower() == "data":
        return ""
    path = os.path.normpath(_path_of_file_uri(reference)) if reference else ""
    if Path(path).is_absolute() and path.startswith(f"{folder}{os.sep}"):
        path = os.path.relpath(path, folder)
    return path.strip("/").replace("\\", "/").replace("/", "__")


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
        raise RowError("damaged_image", "A data: URI must hold base64.")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("damaged_image", f"The data: URI is no valid base64: {error}.") from error
