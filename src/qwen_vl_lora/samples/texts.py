"""Texts of captions and prompts: cleaning, tokens of the chat format, and CSV cells.

Knows nothing of rows or pictures.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata

from qwen_vl_lora.samples.records import RowError

MAX_TEXT_CHARACTERS = 32_768
"""Length of the longest turn. At four characters per token, this is the largest `max_length` of a recipe (8192)."""

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,64}\|>")
"""Form of all tokens of the chat format: <|im_end|>, <|image_pad|>, <|vision_start|>, <|endoftext|>, …"""

_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_KEPT_CONTROLS = "\t\n\r"
_BREAKS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", "\n"))
"""Characters that end a line or page. Removing them would join two words."""

NOTHING_WORDS = frozenset(
    (
        *("", "nan", "none", "null", "nil", "undefined", "nat", "<na>", "n/a", "na", "#n/a", "(null)", "(none)"),
        *("#ref!", "#value!", "#name?", "#div/0!", "#num!", "#null!", "[]", "{}", "()", '""', "''", "['']", '[""]'),
    )
)
"""What programs and spreadsheets write for a missing caption, in lower case."""

_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")
_BLANK_SYMBOLS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers of Hangul and the empty Braille cell, which are invisible


def clean_text(text: str, collapse_whitespace: bool) -> str:
    """Remove control characters and, with `collapse_whitespace`, make each run of blanks and line breaks one blank.

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
        text = "".join(filter(_is_kept, text.translate(_BREAKS)))
    if collapse_whitespace:
        text = " ".join(text.split())
    token = find_special_token(text)
    if token is not None:
        raise RowError("special_token", f"The text contains {token}, which is reserved for the chat format.")
    return text


def says_something(text: str) -> bool:
    """Whether a text has visible characters: not only blanks, joiners, direction marks and fillers."""
    return any(
        # Letters, numbers, punctuation, symbols, and private-use characters.
        (unicodedata.category(character)[0] in "LNPS" or unicodedata.category(character) == "Co")
        and character not in _BLANK_SYMBOLS
        for character in text
    )


def means_nothing(text: str) -> bool:
    """Whether a text is what programs write for a missing text."""
    return len(text) < 32 and text.strip().casefold() in NOTHING_WORDS


def texts_of_cell(cell: str) -> tuple[str, ...] | None:
    """Parse a list of texts that JSON, Python or numpy wrote into a cell; None if it is not such a list."""
    cell = cell.strip()
    if not (cell.startswith(("[", "(")) and cell.endswith(("]", ")"))) or len(cell) > MAX_TEXT_CHARACTERS:
        return None
    # numpy writes no commas: ['A dog.' 'Two cats.'], which Python would read as one joined text.
    quoted = _QUOTED.findall(cell)
    if len(quoted) > 1 and not _QUOTED.sub("", cell).strip("[] \n"):
        return tuple(one or two for one, two in quoted)
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, (list, tuple)) and found and all(isinstance(text, str) for text in found):
            return tuple(found)
    return None


def find_special_token(text: str) -> str | None:
    """Return the first token of the chat format in a text."""
    found = _SPECIAL_TOKEN.search(text) if "<|" in text else None
    return found.group() if found else None


def printable(text: str, max_characters: int = 200) -> str:
    """Return a text that is safe for logs, terminals and UTF-8 files, cut to a length."""
    shown = text[:max_characters].encode("utf-8", errors="backslashreplace").decode("utf-8")
    shown = "".join(character if character.isprintable() else " " for character in shown)
    return shown if len(text) <= max_characters else f"{shown}…"


def spreadsheet_cell(text: str) -> str:
    """Prefix a text that a spreadsheet would run as a formula with an apostrophe; `text_of_cell` undoes it exactly."""
    return f"'{text}" if _may_be_run(text) else text


def text_of_cell(cell: str) -> str:
    """Return the text that was given to `spreadsheet_cell`."""
    return cell[1:] if cell.startswith("'") and _may_be_run(cell) else cell


def _may_be_run(text: str) -> bool:
    # Also after the text's own apostrophes, because the added one could not be distinguished from them.
    text = text.lstrip("'")
    return text.lstrip().startswith(_FORMULA_STARTS) or text.startswith(("\t", "\r", "\n"))


def _is_kept(character: str) -> bool:
    # U+FEFF is a byte order mark that was attached to the first cell. Other format characters join emoji and letters.
    return character in _KEPT_CONTROLS or (unicodedata.category(character) != "Cc" and character != "\ufeff")
