"""No text makes a terminal do anything."""

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.texts import visible, visible_line, visible_output

BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x1b\\",
    "link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "hidden": "\x1b[8mhidden\x1b[0m",
    "cursor": "\x1b[2K\x1b[1A",
    "C1": "\x9b2J \x9d0;owned\x9c",
    "carriage return": "honest\rforged",
    "backspace": "bad\x08\x08\x08good",
    "directions": f"a{BIDI_CONTROLS}b",
    "separator": "a\u2028b\u2029c",
    "not UTF-8": "a\udcffb",
}
ANY_TEXT = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\x1b\x9b[]8;m\r\n\t\x07" + BIDI_CONTROLS)))


def does_something(character):
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in "\n\t"
    return is_control or character in BIDI_CONTROLS


@given(ANY_TEXT)
def test_nothing_of_any_text_acts_on_a_terminal(text):
    assert not any(map(does_something, visible(text)))
    assert not any(map(does_something, visible_line(text)))
    assert visible_line(text).isascii() or visible_line(text).encode("utf-8")
    assert not set("\n\t") & set(visible_line(text))


def test_known_attacks_stay_readable():
    for text in HOSTILE.values():
        assert not any(map(does_something, visible(text)))
    assert visible(HOSTILE["title"]) == r"\x1b]0;owned\x07"
    assert visible("a\u202eb") == r"a\u202eb"
    assert visible_line("a\nb.jpg: forged") == r"a\nb.jpg: forged"


def test_ordinary_texts_stay_as_they_are():
    family, persian = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "کتاب\u200cها.jpg"
    for text in ("a dog [bold]on[/bold] a sofa :cat:", "一只狗", family, persian, "two\nlines\tand a tab", "e\u0301"):
        assert visible(text) == text


@given(ANY_TEXT)
def test_a_pipe_is_sent_no_sequence_at_all(text):
    shown = visible_output(text, styled=False)
    assert not any(map(does_something, shown.replace("\r", "")))


@given(ANY_TEXT)
def test_a_terminal_is_sent_colours_and_the_moves_of_a_progress_bar_alone(text):
    shown = visible_output(text, styled=True)
    rest = re.sub(r"\x1b\[(\d{1,3}(;\d{1,3})*)?m|\x1b\[A|\r", "", shown)
    assert not any(map(does_something, rest))


def test_colours_reach_a_terminal():
    assert visible_output("\x1b[1;31mred\x1b[0m\x1b]0;x\x07", styled=True) == "\x1b[1;31mred\x1b[0m\\x1b]0;x\\x07"
