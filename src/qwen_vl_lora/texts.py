"""Safe texts: what comes from captions, records, models and file names, as a terminal may be given it.

A terminal obeys control characters that it is sent: escape sequences set its title, move its cursor, write to the
clipboard and hide text; direction marks show a text in another order than it has. Here they become visible escapes.
Everything that the project prints passes `visible`; its streams (`console.py`) pass everything else through
`visible_output`.
"""

from __future__ import annotations

import re

_CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_DIRECTIONS = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
_OTHERS = r"\u2028\u2029\ufff9-\ufffb\ud800-\udfff"  # line separators, annotations, bytes that are not UTF-8
_UNSAFE = re.compile(f"[{_CONTROLS}{_DIRECTIONS}{_OTHERS}]")
_UNSAFE_IN_A_LINE = re.compile(f"[\t\n{_CONTROLS}{_DIRECTIONS}{_OTHERS}]")

# What rich (colours) and tqdm (one line up, back to the line's start) send to a terminal.
_STYLED = re.compile(r"(\x1b\[(?:\d{1,3}(?:;\d{1,3})*)?m|\x1b\[A|\r)")


def visible(text: str) -> str:
    r"""A text of several lines, its control characters and direction marks written as `\x1b` and `\u202e`."""
    return _UNSAFE.sub(_escaped, text.replace("\r\n", "\n"))


def visible_line(text: str) -> str:
    r"""A text that stays on its line: line breaks and tabs are written as `\n` and `\t`, too."""
    return _UNSAFE_IN_A_LINE.sub(_escaped, text)


def visible_output(text: str, *, styled: bool) -> str:
    """What a program prints, without sequences that do more than colour it.

    Args:
        styled: whether colours may pass, and what progress bars need. A carriage return always passes.
    """
    if not _UNSAFE.search(text):
        return text
    parts = _STYLED.split(text)  # every second one is a sequence
    return "".join(
        part if number % 2 and (styled or part == "\r") else _UNSAFE.sub(_escaped, part)
        for number, part in enumerate(parts)
    )


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    named = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}.get(found[0])
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
