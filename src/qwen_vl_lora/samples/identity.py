"""Ids of pictures: one id names one picture. An id made from a file name never rejects a row."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from qwen_vl_lora.samples.image_store import ImageEntry
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import find_special_token, printable

MAX_ID_CHARACTERS = 1000


class ImageRegister:
    """The pictures of a collection by id, in the order in which they were entered."""

    def __init__(self) -> None:
        self._by_id: dict[str, ImageEntry] = {}

    @property
    def entries(self) -> list[ImageEntry]:
        """One entry for each id; a picture under two ids has two."""
        return list(self._by_id.values())

    def claim(self, entries: Sequence[ImageEntry], *, may_rename: bool = False) -> list[ImageEntry]:
        """Enter the pictures of one sample and return their entries: the earlier entry if an id is known.

        Args:
            may_rename: the id was made from a path. If it names another picture already, the new picture gets
                the id with the start of its sha256 appended.

        Raises:
            RowError: `duplicate_id`; nothing is entered.
        """
        if may_rename:
            entries = [self._with_free_id(entry) for entry in entries]
        for entry in entries:
            if self._by_id.get(entry.id, entry).sha256 != entry.sha256:
                raise RowError(
                    "duplicate_id",
                    f"The id {printable(entry.id)!r} already names another picture. Give each picture its own id.",
                )
        return [self._by_id.setdefault(entry.id, entry) for entry in entries]

    def _with_free_id(self, entry: ImageEntry) -> ImageEntry:
        entry = entry._replace(id=shown_id(entry.id))
        if self._by_id.get(entry.id, entry).sha256 == entry.sha256:
            return entry
        return entry._replace(id=f"{entry.id}-{entry.sha256[:12]}")


def image_ids(sample_id: str, num_images: int) -> list[str]:
    """Return the ids of a sample's pictures: its own id for one, `id#1`, `id#2`, … for several."""
    return [sample_id] if num_images == 1 else [f"{sample_id}#{number}" for number in range(1, num_images + 1)]


def shown_id(path: str) -> str:
    """Return an id made from a path, without characters that tables or terminals cannot show."""
    kept = "".join(character for character in path if unicodedata.category(character) not in ("Cc", "Cs"))
    while token := find_special_token(kept):
        kept = kept.replace(token, "")
    return kept[:MAX_ID_CHARACTERS] or "image"


def check_id(image_id: str) -> None:
    """Raises: RowError `bad_id` or `bad_encoding`."""
    if not image_id.isascii() and any(unicodedata.category(character) == "Cs" for character in image_id):
        raise RowError("bad_encoding", f"The id {printable(image_id)} is not UTF-8. Save the source as UTF-8.")
    if not image_id.strip() or len(image_id) > MAX_ID_CHARACTERS:
        raise RowError("bad_id", f"The id has {len(image_id)} characters; 1 to {MAX_ID_CHARACTERS} are allowed.")
    controls = (f"U+{ord(character):04X}" for character in image_id if unicodedata.category(character) == "Cc")
    fault = next(controls, None) or find_special_token(image_id)
    if fault:
        raise RowError(
            "bad_id",
            f"The id {printable(image_id)!r} has {fault}; control characters and tokens of the chat format are not "
            "allowed.",
        )
