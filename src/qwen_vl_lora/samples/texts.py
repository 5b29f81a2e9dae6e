"""Texts of captions and prompts: cleaning, the chat format's own tokens, and cells of a CSV.

Knows nothing of rows or images.
"""

from __future__ import annotations

import re
import unicodedata

from qwen_vl_lora.samples.records import RowError

MAX_TEXT_CHARACTERS = 32_768
"""Longest turn. Four characters to a token, this is the largest `max_length` (8192) that a recipe uses."""

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
"""Every token of the chat format has this form: <|im_end|>, <|image_pad|>, <|vision_start|>, <|endoftext|>, …"""

_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_KEPT_CONTROLS = "\t\n\r"
_BLANK_SYMBOLS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers of Hangul and the empty cell of Braille: shown as nothing


def clean_text(text: str, collapse_whitespace: bool) -> str:
    """Drop control characters and, if asked, make every run of blanks and line breaks one blank.

    Raises:
        RowError: `caption_too_long`, `bad_encoding` or `special_token`.
    """
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RowError(
            "caption_too_long", f"The text has {len(text)} characters; at most {MAX_TEXT_CHARACTERS} are read."
        )
    if not text.isascii() and any(unicodedata.category(character) == "Cs" for character in text):
        raise RowError("bad_encoding", f"The text is not UTF-8: {printable(text)}. Save the source as UTF-8.")
    if not text.isprintable():
        text = "".join(filter(_is_kept, text))
    if collapse_whitespace:
        text = " ".join(text.split())
    token = find_special_token(text)
    if token is not None:
        raise RowError("special_token", f"The text holds {token}, which the chat format uses for itself.")
    return text


def says_something(text: str) -> bool:
    """Whether a text holds anything that is seen: not only blanks, joiners, direction marks and fillers."""
    return any(
        # Letters, numbers, punctuation, symbols; and what people's own fonts draw.
        (unicodedata.category(character)[0] in "LNPS" or unicodedata.category(character) == "Co")
        and character not in _BLANK_SYMBOLS
        for character in text
    )


def find_special_token(text: str) -> str | None:
    """Return the first token of the chat format in a text."""
    found = _SPECIAL_TOKEN.search(text) if "<|" in text else None
    return found.group() if found else None


def printable(text: str, max_characters: int = 200) -> str:
    """Return a text that any log, terminal and UTF-8 file can hold, cut to a length."""
    shown = text[:max_characters].encode("utf-8", errors="backslashreplace").decode("utf-8")
    shown = "".join(character if character.isprintable() else " " for character in shown)
    return shown if len(text) <= max_characters else f"{shown}…"


def spreadsheet_cell(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would run as a formula; `text_of_cell` undoes it exactly."""
    return f"'{text}" if _may_be_run(text) else text


def text_of_cell(cell: str) -> str:
    """The text that `spreadsheet_cell` was given."""
    return cell[1:] if cell.startswith("'") and _may_be_run(cell) else cell


def _may_be_run(text: str) -> bool:
    # Behind apostrophes of the text's own too: ours would otherwise not be told from them.
    text = text.lstrip("'")
    return text.lstrip().startswith(_FORMULA_STARTS) or text.startswith(("\t", "\r", "\n"))


def _is_kept(character: str) -> bool:
    # U+FEFF is a byte order mark that was glued to the first cell. Other format characters join emoji and letters.
    return character in _KEPT_CONTROLS or (unicodedata.category(character) != "Cc" and character != "\ufeff")
