"""Captions drawn on a contact sheet: a font that knows their script, lines that fit.

Pillow's own font knows Latin letters only, so fonts of the system are looked for. A caption that none of
them can draw gives way to a note: rows of empty boxes would say nothing.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator

from PIL import ImageFont

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

NO_FONT = "(no font for this script here)"

# Tried in order; Pillow searches the system's font folders by file name.
_FONT_FILES = (
    "DejaVuSans.ttf",
    "Arial.ttf",
    "arial.ttf",
    "LiberationSans-Regular.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simsun.ttc",
)
_UNASSIGNED = "\U0010fffe"
"""Draws a font's sign for a character that it lacks."""

_WIDE = "\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003fffd"
_UNBREAKABLE = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+|\s+")


def choose_lettering(text: str, size: int) -> tuple[str, Font]:
    """What to draw for `text`, and the font to draw it with: the first that lacks the fewest of its characters.

    Text of which most characters are in no font becomes `NO_FONT`.

    Args:
        size: px.
    """
    letters = {letter for letter in text if not letter.isspace()}
    fonts = _fonts(size)
    lacking = [sum(not _draws(font, letter) for letter in letters) for font in fonts]
    best = lacking.index(min(lacking))
    if 2 * lacking[best] > len(letters):
        _warn()
        return NO_FONT, fonts[0]
    return text, fonts[best]


def wrap_text(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Lines no wider than `width` px; breaks at blanks, between Chinese characters, and inside overlong words.

    What is beyond `max_lines` gives way to an ellipsis.
    """
    lines = [""]
    for part in _pieces(text, font, width):
        if font.getlength((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    lines = [line.rstrip() for line in lines]
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last.rstrip() + "…"]


def _pieces(text: str, font: Font, width: int) -> Iterator[str]:
    for part in _UNBREAKABLE.findall(text):
        yield from [part] if font.getlength(part) <= width else part


@functools.cache
def _fonts(size: int) -> list[Font]:
    found: list[Font] = []
    for name in _FONT_FILES:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return [*found, ImageFont.load_default(size)]


@functools.cache
def _draws(font: Font, letter: str) -> bool:
    return bytes(font.getmask(letter)) != bytes(font.getmask(_UNASSIGNED))


@functools.cache
def _warn() -> None:
    """Once: a sheet may hold many such captions."""
    logger.warning(
        "No font on this machine draws the script of some captions, so contact sheets leave them out. The HTML "
        "report shows them. A font such as Noto Sans CJK mends it: on Debian, apt-get install fonts-noto-cjk."
    )
