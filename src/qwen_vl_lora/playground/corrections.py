"""Captions that a person wrote or corrected, saved in forms that training reads."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.playground.tryout import Picture
from qwen_vl_lora.runs.storage import make_folder, sync_file, sync_folder, temporary, write_whole
from qwen_vl_lora.samples.records import IMAGE_SLOT, RowError
from qwen_vl_lora.samples.texts import clean_text, says_something

ROWS, SIDECARS = "rows", "sidecars"
"""Folders of saved captions: one for training rows with their pictures, one for pictures with a text beside each."""

ROWS_FILE = "captions.jsonl"


@dataclass(frozen=True)
class Corrections:
    """The folder of saved captions."""

    folder: Path

    def save_sidecar(self, picture: Picture, caption: str) -> Path:
        """Save the picture and, beside it, its caption as one line. A later caption of the picture replaces it.

        Raises:
            RowError: if the caption cannot be trained.
        """
        line = _usable(caption, is_one_line=True)
        place = self._save_picture(picture, self.folder / SIDECARS).with_suffix(".txt")
        write_whole(place, f"{line}\n")
        return place

    def save_row(self, picture: Picture, caption: str, settings: Parameters) -> Path:
        """Append question and caption as a line of JSON, and save the picture. A later line of them replaces it.

        Raises:
            RowError: if the caption cannot be trained.
        """
        place = self._save_picture(picture, self.folder / ROWS / "images")
        user, system = settings.prompt.user, settings.prompt.system
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": user if IMAGE_SLOT in user else f"{IMAGE_SLOT}{user}"})
        answer = {"role": "assistant", "content": _usable(caption, is_one_line=False)}
        row = {"images": [place.relative_to(self.folder / ROWS).as_posix()], "messages": [*turns, answer]}
        file = self.folder / ROWS / ROWS_FILE
        with _SAVING:
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            others = [line for line in lines if not _asks_the_same(line, row)]
            write_whole(file, "".join(f"{line}\n" for line in [*others, json.dumps(row, ensure_ascii=False)]))
        return file

    def _save_picture(self, picture: Picture, folder: Path) -> Path:
        """Save the bytes under the picture's own name and the beginning of its hash, which keeps names apart."""
        entry = picture.images.by_sha256(picture.sha256)
        stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in PurePath(picture.name).stem)[:60]
        place = folder / f"{stem}-{picture.sha256[:12]}{entry.suffix}"
        make_folder(folder)
        if not place.exists():
            partial = temporary(place)
            partial.write_bytes(picture.images.read_bytes(picture.sha256))
            sync_file(partial)
            partial.replace(place)
            sync_folder(folder)
        return place


_SAVING = threading.Lock()
"""Two people may save a row at the same time."""


def _asks_the_same(line: str, row: Mapping[str, Any]) -> bool:
    other = json.loads(line)
    return bool(other["images"] == row["images"] and other["messages"][:-1] == row["messages"][:-1])


def _usable(caption: str, *, is_one_line: bool) -> str:
    text = clean_text(caption, is_one_line).strip()
    if not says_something(text):
        raise RowError("empty_caption", "There is no caption to save. Write one.")
    return text
