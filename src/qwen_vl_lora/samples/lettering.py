"""Draws captions on a contact sheet: selects a font for their script and breaks lines.

Pillow's own font has Latin letters only, so system fonts are searched. A caption that no font can draw is
replaced with a note instead of rows of empty boxes. Any text is accepted: what Pillow cannot lay out is
replaced first, and a sheet never fails a run.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import ImageFont

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

NO_FONT = "(no font for this script here)"

# Tried in order. Pillow searches the system's font folders by file name.
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
"""A character that fonts lack: it draws the font's sign for a missing glyph."""

_MAX_LETTERS = 2000
"""More than fits on any sheet. Pillow lays out a whole line at once, of any length."""

_JOINERS = "\u200c\u200d"
"""Format characters that change how letters are drawn, in Persian, Indic scripts and emoji."""

_WIDE = "\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003fffd"
_UNBREAKABLE = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+|\s+")


def clean_text(text: str) -> str:
    """Return lines that Pillow can lay out, joined by `\\n`, without blank lines and text beyond any sheet.

    Every kind of line break ends a line (Raqm refuses all of them), tabs and other controls become blanks, lone
    surrogates become U+FFFD, and direction marks are removed.
    """
    lines = ("".join(map(_clean_letter, line)).strip() for line in text.splitlines())
    cleaned = "\n".join(line for line in lines if line)
    return cleaned if len(cleaned) <= _MAX_LETTERS else cleaned[: _MAX_LETTERS - 1] + "…"


def choose_lettering(text: str, size: int) -> tuple[str, Font]:
    """Return what to draw for `text`, and the first font that lacks the fewest of its characters.

    If most characters are in no font, the text becomes `NO_FONT`.

    Args:
        size: px.
    """
    text = clean_text(text)
    letters = {letter for letter in text if not letter.isspace() and letter not in _JOINERS}
    fonts = _fonts(size)
    lacking = [sum(not _draws(font, letter) for letter in letters) for font in fonts]
    best = lacking.index(min(lacking))
    if 2 * lacking[best] > len(letters):
        _warn()
        return NO_FONT, fonts[0]
    return text, fonts[best]


def can_draw(text: str, size: int) -> bool:
    """Whether one font has all characters of a text."""
    return any(all(letter.isspace() or _draws(font, letter) for letter in text) for font in _fonts(size))


def wrap_text(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """Break a text into lines no wider than `width` px: at line breaks and blanks, between Chinese characters, and
    inside overlong words.

    Text beyond `max_lines` is replaced with an ellipsis.
    """
    lines: list[str] = []
    for paragraph in clean_text(text).split("\n"):
        for line in _wrap_line(paragraph, font, width):
            if len(lines) == max_lines:
                return [*lines[:-1], _with_ellipsis(lines[-1], font, width)]
            lines.append(line)
    return lines


def report_undrawn(sheet: str, faults: Sequence[Exception]) -> None:
    """Log in one line that parts of a sheet are placeholders, with the reason for the first."""
    if faults:
        logger.warning(
            "%d parts of the %s could not be drawn and are empty; the first: %s: %s. Nothing else is affected.",
            len(faults),
            sheet,
            type(faults[0]).__name__,
            faults[0],
        )


def _clean_letter(letter: str) -> str:
    match unicodedata.category(letter):
        case "Cc":
            return " "
        case "Cs":
            return "\ufffd"
        case "Cf":
            return letter if letter in _JOINERS else ""
    return letter


def _wrap_line(text: str, font: Font, width: int) -> Iterator[str]:
    line = ""
    for part in _pieces(text, font, width):
        if line and font.getlength((line + part).rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += part if line else part.lstrip()
    yield line.rstrip()


def _with_ellipsis(line: str, font: Font, width: int) -> str:
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


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
    """Log once, because a sheet may contain many such captions."""
    logger.warning(
        "No font on this machine draws the script of some captions, so contact sheets omit them. The HTML "
        "report shows them. Install a font such as Noto Sans CJK: on Debian, apt-get install fonts-noto-cjk."
    )
