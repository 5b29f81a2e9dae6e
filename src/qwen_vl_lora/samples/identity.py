"""Ids of images: one id names one picture, and no two ids can be taken for each other."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from qwen_vl_lora.samples.image_store import ImageEntry
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import find_special_token, printable

MAX_ID_CHARACTERS = 1000


class ImageRegister:
    """The images of a collection under their ids, in the order in which they were claimed."""

    def __init__(self) -> None:
        self._by_form: dict[str, ImageEntry] = {}

    @property
    def entries(self) -> list[ImageEntry]:
        """One for each id; a picture under two ids has two."""
        return list(self._by_form.values())

    def claim(self, entries: Sequence[ImageEntry]) -> list[ImageEntry]:
        """Enter the images of one sample and return them as entered: the earlier one where an id is known.

        Raises:
            RowError: `ambiguous_id` or `duplicate_id`; nothing is entered then.
        """
        forms = [_form(entry.id) for entry in entries]
        for form, entry in zip(forms, entries, strict=True):
            _check_same(self._by_form.get(form, entry), entry)
        return [self._by_form.setdefault(form, entry) for form, entry in zip(forms, entries, strict=True)]


def image_ids(sample_id: str, num_images: int) -> list[str]:
    """The ids of a sample's images: its own for one, `id#1`, `id#2`, … for several."""
    return [sample_id] if num_images == 1 else [f"{sample_id}#{number}" for number in range(1, num_images + 1)]


def check_id(image_id: str) -> None:
    """Raises: RowError `bad_id` or `bad_encoding`."""
    if not image_id.isascii() and any(unicodedata.category(character) == "Cs" for character in image_id):
        raise RowError("bad_encoding", f"The id {printable(image_id)} is not UTF-8. Save the source as UTF-8.")
    if not image_id.strip() or len(image_id) > MAX_ID_CHARACTERS:
        raise RowError("bad_id", f"The id has {len(image_id)} characters; 1 to {MAX_ID_CHARACTERS} are allowed.")
    slash = next((character for character in image_id if character in "/\\"), None)
    unseen = next((f"U+{ord(character):04X}" for character in image_id if not character.isprintable()), None)
    fault = slash or unseen or find_special_token(image_id)
    if fault:
        raise RowError(
            "bad_id",
            f"The id {printable(image_id)!r} holds {fault}; slashes, invisible characters and tokens of the chat "
            "format are not allowed. Where the path became the id, give ids of your own.",
        )


def _check_same(known: ImageEntry, claimed: ImageEntry) -> None:
    if known.id != claimed.id:
        raise RowError(
            "ambiguous_id",
            f"The id {claimed.id!r} differs from the id {known.id!r} only in case or Unicode form. Rename one.",
        )
    if known.sha256 != claimed.sha256:
        raise RowError(
            "duplicate_id", f"The id {claimed.id!r} already names another picture. Give each picture its own id."
        )


def _form(image_id: str) -> str:
    """What ids have in common that differ only in case or Unicode form."""
    if image_id.isascii():
        return image_id if image_id.islower() else image_id.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", image_id).casefold())
