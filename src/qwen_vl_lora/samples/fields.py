"""Finds the keys of a record, or columns of a table, that hold the picture, the caption, the id and the split.

Only this module knows the names. A name given by the user takes precedence, then the project's own (`image_path`,
`caption`, `image_id`), then the names in public data sets, in any case. Ambiguous names are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.samples.source import Reading
from qwen_vl_lora.samples.texts import printable

IMAGE_NAMES = (
    *("image", "images", "file_name", "filename", "filepath", "file_path", "path", "image_file", "image_name"),
    *("image_filename", "img", "img_path", "picture", "photo"),
)
"""Names of columns that hold a picture or its path, besides `image_path`."""

ADDRESS_NAMES = ("image_url", "img_url", "url")
"""Used if no other name of a picture is present: beside a file they state its origin."""

CAPTION_NAMES = (
    *("captions", "text", "description", "comment", "sentence", "sentences", "raw", "caption_str"),
    *("image_caption", "image_description"),
)

ID_NAMES = ("image_id", "img_id")
"""Names of ids in tables. A column `id` is not one of them, because it often counts rows."""

UNUSABLE_FLAGS = (
    *("is_rejected", "rejected", "is_precanned", "iscrowd", "is_crowd", "is_deleted", "deleted", "is_excluded"),
    *("excluded", "exclude", "is_invalid", "invalid", "is_bad", "discard", "discarded", "is_corrupt", "was_cancelled"),
)
"""Flags of data sets: true marks a row that must not be used."""

USABLE_FLAGS = ("is_valid", "valid", "is_usable", "usable", "keep", "is_approved", "approved")
"""Flags of data sets: false marks a row that must not be used."""

_NUMBERED = re.compile(r"(?P<base>.*?[a-z])[_ ]?\d{1,3}", re.ASCII)
_NO_NAME = re.compile(r"(unnamed: \d+|index|__index_level_\d+__)?")
"""Column of pandas' row numbers."""


@dataclass(frozen=True, slots=True)
class Fields:
    """Names as written in the file.

    Attributes:
        image: holds the picture; None when no name is known.
        captions: one name, or several numbered ones (`caption_0` to `caption_4`).
        id: identifies the picture; None when there is none.
        split: holds the file's own split; None if `captions.split_column` is null.
        flags: mark rows that may, or must not, be used.
        ignored: all others, except row numbers.
    """

    image: str | None
    captions: tuple[str, ...]
    id: str | None
    split: str | None
    flags: tuple[str, ...]
    ignored: tuple[str, ...]


def find_fields(
    names: Sequence[str], reading: Reading, ids: Collection[str] = ID_NAMES, holds: Sequence[str] = ()
) -> Fields:
    """Find the fields of a record by its names.

    Args:
        reading: contains the names given by the user.
        ids: names that can hold an id.
        holds: those of `names` whose values are pictures: a path beside them is not read.

    Raises:
        DataFormatError: when a given name is missing or occurs twice, or names are ambiguous.
    """
    given = {} if reading.columns is None else reading.columns.model_dump(exclude_none=True)
    plain = {name: plain_name(name) for name in names}
    image = _chosen("image", given, names) or _one("image", _images(plain, holds))
    captions = _chosen_captions(given, names) or _captions(plain)
    image_id = _chosen("id", given, names) or _first(plain, ids)
    split = None if reading.split_column is None else _named("split_column", reading.split_column, names)
    flags = tuple(name for name, form in plain.items() if form in UNUSABLE_FLAGS or form in USABLE_FLAGS)
    used = {image, *captions, image_id, split, *flags}
    for name in used - {None}:
        if names.count(name) > 1:
            raise DataFormatError(
                f"The column `{printable(str(name), 50)}` occurs {names.count(name)} times. Rename one."
            )
    ignored = tuple(name for name, form in plain.items() if name not in used and not _NO_NAME.fullmatch(form))
    return Fields(image, captions, image_id, split, flags, ignored)


def plain_name(name: str) -> str:
    """Return a name for comparison: in lower case, with `_` for blanks."""
    return name.strip().lower().replace(" ", "_")


def is_readable(names: Sequence[str], reading: Reading) -> bool:
    """Whether names can be the header of a table of captions: picture and caption are known, or ambiguous."""
    try:
        fields = find_fields(names, reading)
    except DataFormatError:
        return len(names) > 1
    return fields.image is not None and bool(fields.captions)


def _chosen(kind: str, given: dict[str, object], names: Sequence[str]) -> str | None:
    name = given.get(kind)
    return None if name is None else _named(f"columns.{kind}", str(name), names)


def _chosen_captions(given: dict[str, object], names: Sequence[str]) -> tuple[str, ...]:
    wanted = given.get("caption", [])
    listed = wanted if isinstance(wanted, list) else [wanted]
    return tuple(_named("columns.caption", str(name), names) for name in listed)


def _named(setting: str, name: str, names: Sequence[str]) -> str:
    """Return the name in the file for a given name: the same, or the same in another case."""
    found = [there for there in names if there == name] or [
        there for there in names if there.strip().lower() == name.strip().lower()
    ]
    if len(found) != 1:
        raise DataFormatError(
            f"captions.{setting} is `{name}`, but the data has "
            f"{'several columns of that name' if found else 'no such column'}; its columns: {_listed(names)}."
        )
    return found[0]


def _images(plain: dict[str, str], holds: Sequence[str]) -> list[str]:
    """Return the names of the first kind that is present."""
    kinds = (("image_path",), IMAGE_NAMES, ADDRESS_NAMES)
    if holding := [name for name, form in plain.items() if name in holds and any(form in kind for kind in kinds)]:
        return holding
    for kind in kinds:
        if found := [name for name, form in plain.items() if form in kind]:
            return found
    return []


def _captions(plain: dict[str, str]) -> tuple[str, ...]:
    bases: dict[str, list[str]] = {}
    for name, form in plain.items():
        numbered = _NUMBERED.fullmatch(form)
        base = numbered["base"] if numbered and form not in ("caption", *CAPTION_NAMES) else form
        if base in ("caption", *CAPTION_NAMES):
            bases.setdefault(base, []).append(name)
    if "caption" in bases:
        bases = {"caption": bases["caption"]}
    if len(bases) > 1:
        _one("caption", [name for found in bases.values() for name in found])
    found = next(iter(bases.values()), [])
    if len({plain[name] for name in found}) < len(found):
        _one("caption", found)
    return tuple(found)


def _first(plain: dict[str, str], wanted: Collection[str]) -> str | None:
    """Return the name of the first wanted form; None if it is missing or occurs twice."""
    for form in wanted:
        found = [name for name, other in plain.items() if other == form]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _one(kind: str, found: Sequence[str]) -> str | None:
    if len(found) > 1:
        raise DataFormatError(
            f"{_listed(found)} can each be the {kind}. Choose one of them: captions.columns.{kind}={found[0]}."
        )
    return found[0] if found else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{printable(str(name), 50)}`" for name in names[:20]) or "no name"
