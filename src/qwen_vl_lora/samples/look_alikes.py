"""Suggests a similar file for a missing picture, for the message about it.

The work is bounded: only a few requests of a run are answered, from a few cached folder listings.
"""

from __future__ import annotations

import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

MAX_ANSWERS = 20
MAX_LISTINGS = 64
MAX_ENTRIES = 20_000
_MAX_TAIL = 4

_DRIVE = re.compile(r"^[A-Za-z]:(?=/)")
_LOCAL_FILE = re.compile(r".*/data/local-files/\?d=(.+)", re.DOTALL)
_UPLOAD = re.compile(r".*/data/upload/(?:\d+/)?(?:[0-9a-f]{8}-)?([^/]+)", re.DOTALL)
"""Label Studio prefixes the name of an uploaded file with the project number and eight digits."""


class LookAlikes:
    """Finds pictures with similar paths below the folders of a source."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [os.path.normpath(folder) for folder in folders]
        self._lock = threading.Lock()
        self._answers = 0
        self._listings: dict[str, dict[str, list[str]]] = {}

    def hint(self, path: str) -> str:
        """Return a sentence, with a leading blank, that names a similar file; empty if none or at the limit."""
        with self._lock:
            if self._answers >= MAX_ANSWERS:
                return ""
            self._answers += 1
            for folder in self._folders:
                wanted = _below(path, folder)
                for tail in _tails(wanted):
                    for start in (folder, *self._inner_folders(folder)):
                        found = self._find(start, tail)
                        if found is not None and found != path:
                            return f" {_sentence(path, found, wanted)}"
        return ""

    def _inner_folders(self, folder: str) -> list[str]:
        names = [name for found in self._list(folder).values() for name in found]
        inner = (f"{folder}{os.sep}{name}" for name in names if "." not in name)
        return list(islice((name for name in inner if Path(name).is_dir()), 8))

    def _find(self, folder: str, parts: Sequence[str]) -> str | None:
        """Find a file below a folder by its parts, in another case or Unicode form, or with another ending."""
        for number, part in enumerate(parts):
            listing = self._list(folder)
            found = listing.get(_folded(part), [])
            if not found and number == len(parts) - 1:
                found = listing.get(f"{_folded(Path(part).stem)}.", [])
            if not found:
                return None
            folder = f"{folder}{os.sep}{part if part in found else found[0]}"
        return folder if Path(folder).is_file() else None

    def _list(self, folder: str) -> dict[str, list[str]]:
        """Return folded names, and folded stems followed by a dot, with the names that they stand for."""
        if folder in self._listings:
            return self._listings[folder]
        listing: dict[str, list[str]] = {}
        if len(self._listings) < MAX_LISTINGS:
            try:
                with os.scandir(folder) as entries:
                    for entry in islice(entries, MAX_ENTRIES):
                        listing.setdefault(_folded(entry.name), []).append(entry.name)
                        listing.setdefault(f"{_folded(Path(entry.name).stem)}.", []).append(entry.name)
            except OSError:
                listing = {}
            self._listings[folder] = listing
        return listing


def _below(path: str, folder: str) -> str:
    """Return a path with slashes, without the source's folder, a drive or Label Studio's URL."""
    if path.startswith(f"{folder}{os.sep}"):
        path = path[len(folder) + 1 :]
    path = path.replace("\\", "/")
    if (found := _LOCAL_FILE.fullmatch(f"/{path}")) or (found := _UPLOAD.fullmatch(f"/{path}")):
        path = unquote(found[1])
    return _DRIVE.sub("", path).strip("/")


def _tails(wanted: str) -> list[list[str]]:
    """Return the path and its tails, longest first."""
    parts = [part for part in wanted.split("/") if part not in ("", ".", "..")]
    return [parts[start:] for start in range(max(0, len(parts) - _MAX_TAIL), len(parts))]


def _sentence(path: str, found: str, wanted: str) -> str:
    shown = found.encode("unicode_escape").decode() if _same_letters(path, found) else found
    if found == path.replace("\\", "/"):
        return f"A file exists with slashes: {shown}."
    if _same_letters(path, found):
        return f"A file exists in another Unicode form: {shown}."
    if _folded(path) == _folded(found):
        return f"A file exists in another case: {shown}."
    if Path(path.replace("\\", "/")).parent == Path(found).parent:
        return f"A file exists with another ending: {shown}."
    if wanted and found.endswith(f"/{wanted}"):
        return f"A file exists in another folder: {shown}. Set image_folder={found[: -len(wanted) - 1]}."
    return f"A file exists in another folder: {shown}."


def _same_letters(one: str, other: str) -> bool:
    return one != other and unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
