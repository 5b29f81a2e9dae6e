"""The words for a scene: phrases, short captions, and parsing a text into attributes.

Both styles share these words; the chatty answers that the tiny base learns are in
`dialogue`. Independent of pictures, files and models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_lora.tiny.drawing import BACKGROUNDS, COLOURS, SHAPES, SIZES, Placed, Scene, Thing

_TOP, _MIDDLE, _BOTTOM = (
    ("at the top left", "at the top", "at the top", "at the top right"),
    ("on the left", "in the middle", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom", "at the bottom right"),
)
PLACES = (_TOP, _MIDDLE, _MIDDLE, _BOTTOM)
"""By row and column of the cell: the outer rows and columns have their own words, the inner ones share theirs."""

_THING = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\b")


@dataclass(frozen=True, slots=True)
class Attributes:
    """A text's statements about a scene: the background (None if unnamed) and things in order of mention."""

    background: str | None
    things: tuple[Thing, ...]


def name(thing: Thing) -> str:
    """`big red circle`."""
    return f"{thing.size} {thing.colour} {thing.shape}"


def place(placed: Placed) -> str:
    """`at the top left`."""
    return PLACES[placed.row][placed.column]


def relation(first: Placed, second: Placed) -> str:
    """The position of the first relative to the second; rows count before columns."""
    if first.row != second.row:
        return "above" if first.row < second.row else "below"
    return "left of" if first.column < second.column else "right of"


def enumerate_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def short_captions(scene: Scene) -> tuple[str, str, str]:
    """Return the canonical terse caption, then two wordings that differ in the last clause only.

    `big red circle above small blue square, on grey` for two objects, a comma list in
    reading order for more.
    """
    if len(scene.objects) == 2:
        first, second = scene.objects
        things = f"{name(first.thing)} {relation(first, second)} {name(second.thing)}"
    else:
        things = ", ".join(map(name, scene.things))
    ground = scene.background
    return f"{things}, on {ground}", f"{things}, all on {ground}", f"{things}, {ground} background"


def read_attributes(text: str) -> Attributes:
    """Parse a short or long description. A thing that is mentioned twice counts once."""
    text = text.lower()
    background = _BACKGROUND.search(text)
    things = dict.fromkeys(Thing(*match) for match in _THING.findall(text))
    return Attributes(background=background[1] if background else None, things=tuple(things))


def true_attributes(scene: Scene) -> Attributes:
    """Return the attributes of a correct description."""
    return Attributes(background=scene.background, things=scene.things)
