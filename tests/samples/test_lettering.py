"""Captions on contact sheets are drawn in their script, in lines that fit, or say that they cannot be."""

import logging
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from qwen_vl_lora.samples import lettering
from qwen_vl_lora.samples.lettering import NO_FONT, choose_lettering, wrap_text
from samples.fonts import StrictFont

UNKNOWN = "\ue000\ue001\ue002"  # private use: no font of a system draws these


@pytest.fixture(autouse=True)
def _forget():
    lettering._warn.cache_clear()


def test_latin_text_is_drawn_as_it_is_on_every_machine():
    assert choose_lettering("a red dog", 15)[0] == "a red dog"


def test_text_that_no_font_draws_becomes_a_note_and_is_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_lettering(UNKNOWN, 15)[0] == NO_FONT
        assert choose_lettering(UNKNOWN[::-1], 15)[0] == NO_FONT
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "No font on this machine draws the script of some captions"
    ]


def test_one_unknown_character_does_not_hide_the_text():
    assert choose_lettering(f"a red dog {UNKNOWN[0]}", 15)[0] == f"a red dog {UNKNOWN[0]}"


def test_a_chinese_caption_takes_the_font_that_knows_it(monkeypatch):
    latin, chinese = ImageFont.load_default(15), ImageFont.load_default(16)
    monkeypatch.setattr(lettering, "_fonts", lambda size: [latin, chinese])
    monkeypatch.setattr(lettering, "_draws", lambda font, letter: font is chinese or letter.isascii())
    assert choose_lettering("一只狗", 15) == ("一只狗", chinese)
    assert choose_lettering("a dog", 15) == ("a dog", latin)


@pytest.mark.parametrize("text", ["word " * 60, "x" * 300, "一只棕色的狗在公园里奔跑" * 9])
def test_no_line_is_wider_than_asked_and_the_rest_is_an_ellipsis(text):
    font = ImageFont.load_default(15)
    lines = wrap_text(text, font, 200, 3)
    assert len(lines) == 3
    assert all(0 < font.getlength(line) <= 200 for line in lines)
    assert lines[-1].endswith("…")


def test_nothing_is_lost_of_a_text_that_fits():
    font = ImageFont.load_default(15)
    assert " ".join(wrap_text("a red dog runs over the wide grass", font, 120, 9)) == (
        "a red dog runs over the wide grass"
    )
    assert "".join(wrap_text("一只狗在跑", font, 30, 9)) == "一只狗在跑"


ODD_TEXTS = {
    "paragraphs": "A dog.\n\nIt runs.\r\nIt barks.",
    "every line break": "a\rb\x0bc\x0cd\x1ce\x1df\x1eg\x85h\u2028i\u2029j",
    "tabs and NUL": "a\tb\x00c\x1b[31md\x7f",
    "only line breaks": "\n\n\r\n",
    "nothing": "",
    "lone surrogates": "a \ud83d dog \udc80",
    "directions": "\u202eabc\u2066 de\u2069 \ufeff\u200ffg",
    "emoji": "A dog \U0001f469\u200d\U0001f469\u200d\U0001f466 ❤\ufe0f",
    "marks on nothing": "\u0301" * 50,
    "right to left": "שלום\nكلب يجري",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
@pytest.mark.parametrize("fonts", ["of this machine", "that refuse controls"])
def test_any_text_is_laid_out_and_drawn(monkeypatch, fonts, text):
    if fonts == "that refuse controls":
        monkeypatch.setattr(lettering, "_fonts", lambda size: [StrictFont(size)])
    drawn, font = choose_lettering(text, 15)
    draw = ImageDraw.Draw(Image.new("RGB", (200, 20)))
    for line in wrap_text(drawn, font, 200, 7):
        draw.text((0, 0), line, font=font)


any_text = st.text(st.characters(), max_size=60) | st.text(
    st.sampled_from("ab 一\n\r\t\x00\x85\u2028\u2029\ud800\u202e")
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(any_text, st.integers(20, 200), st.integers(1, 7))
@example("\n", 20, 1)
def test_lines_of_any_text_fit_their_width_and_number(text, width, max_lines):
    font = StrictFont(15)
    lines = wrap_text(text, font, width, max_lines)
    assert 1 <= len(lines) <= max_lines
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


def test_a_line_break_of_the_text_breaks_the_line_on_the_sheet():
    font = ImageFont.load_default(15)
    assert wrap_text("A dog.\n\n\tIt runs.\u2029End", font, 200, 7) == ["A dog.", "It runs.", "End"]
    assert wrap_text("A dog.\nIt runs.\nEnd", font, 200, 2) == ["A dog.", "It runs.…"]


@pytest.mark.parametrize("unit", ["x", "word ", "狗", "a\u0301", "line\n", "\u200d", "\x00"])
def test_a_text_of_100_000_characters_is_laid_out_at_once(unit):
    began = time.process_time()
    text, font = choose_lettering(unit * (100_000 // len(unit)), 15)
    assert len(wrap_text(text, font, 300, 7)) <= 7
    assert time.process_time() - began < 2


def test_a_text_can_be_drawn_if_one_font_has_all_its_characters():
    assert lettering.can_draw("a red dog", 15)
    assert not lettering.can_draw(f"a red dog {UNKNOWN}", 15)
