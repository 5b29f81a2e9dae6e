"""Captions on contact sheets are drawn in their script, in lines that fit, or say that they cannot be."""

import logging

import pytest
from PIL import ImageFont

from qwen_vl_lora.samples import lettering
from qwen_vl_lora.samples.lettering import NO_FONT, choose_lettering, wrap_text

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
