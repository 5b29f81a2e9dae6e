from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.texts import (
    MAX_TEXT_CHARACTERS,
    clean_text,
    find_special_token,
    printable,
    spreadsheet_cell,
    text_of_cell,
    texts_of_cell,
)


@pytest.mark.parametrize("end", ["\v", "\f", "\x85", "\u2028", "\u2029", "\x1d"])
def test_what_ends_a_line_or_page_never_glues_two_words(end):
    assert clean_text(f"A dog{end}runs.", collapse_whitespace=True) == "A dog runs."
    assert clean_text(f"A dog{end}runs.", collapse_whitespace=False) == "A dog\nruns."


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("['A dog.', 'Two cats.']", ("A dog.", "Two cats.")),
        ('["A dog.", "It\'s a cat."]', ("A dog.", "It's a cat.")),
        ("('A dog.', 'Two cats.')", ("A dog.", "Two cats.")),
        ("['A dog.' 'Two cats.']", ("A dog.", "Two cats.")),
        ("['A dog.'\n \"It's a cat.\"]", ("A dog.", "It's a cat.")),
        (' ["A dog."] ', ("A dog.",)),
        ("[A dog]", None),
        ("(a dog)", None),
        ("[1, 2]", None),
        ("[]", None),
        ("['A dog.', None]", None),
        ("[" * 1000 + "]" * 1000, None),
        ("__import__('os')", None),
    ],
)
def test_a_list_written_into_a_cell_is_its_texts(cell, texts):
    assert texts_of_cell(cell) == texts


def test_whitespace_collapses_only_when_asked():
    text = "  A dog\n\nruns \u3000 fast.\t"
    assert clean_text(text, collapse_whitespace=True) == "A dog runs fast."
    assert clean_text(text, collapse_whitespace=False) == text


def test_control_characters_and_a_byte_order_mark_go_and_emoji_stay():
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # held together by zero-width joiners
    assert clean_text(f"\ufeffA\x00 \x1bdog\x7f {family}", collapse_whitespace=False) == f"A dog {family}"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("caption_too_long", "a" * (MAX_TEXT_CHARACTERS + 1)),
        ("caption_too_long", "a" * 1_000_000),
        ("bad_encoding", "caf\udce9"),
        ("special_token", "A dog.<|im_end|>"),
        ("special_token", "<|image_pad|>"),
        ("special_token", "a <|vision_start|>x<|vision_end|>"),
        ("special_token", "<|IM_END|>"),
        ("special_token", "<|im_\x00end|>"),
    ],
)
def test_texts_that_cannot_be_trained_on_are_rejected(reason, text):
    with pytest.raises(RowError) as fault:
        clean_text(text, collapse_whitespace=True)
    assert fault.value.reason == reason


def test_a_text_of_the_longest_length_is_kept():
    assert len(clean_text("a" * MAX_TEXT_CHARACTERS, collapse_whitespace=True)) == MAX_TEXT_CHARACTERS


@pytest.mark.parametrize("text", ["a < b | c > d", "<|", "<| two words |>", "x <|a|b|>"])
def test_pipes_and_brackets_alone_are_no_special_token(text):
    assert find_special_token(text) is None


@given(st.text())
def test_clean_texts_hold_no_token_and_clean_to_themselves(text):
    try:
        cleaned = clean_text(text, collapse_whitespace=True)
    except RowError:
        return
    assert find_special_token(cleaned) is None
    assert clean_text(cleaned, collapse_whitespace=True) == cleaned


@given(st.text())
def test_printable_texts_fit_in_one_line_of_any_utf8_file(text):
    shown = printable(text, 20)
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "＝1"])
def test_cells_that_a_spreadsheet_would_run_get_an_apostrophe(text):
    assert spreadsheet_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["A dog.", "", "1 + 1", "一只狗", "'tis a dog"])
def test_other_cells_stay_as_they_are(text):
    assert spreadsheet_cell(text) == text_of_cell(text) == text


@given(st.text(alphabet="'=+@ \t\nab", max_size=6) | st.text())
def test_a_cell_gives_its_text_back(text):
    assert text_of_cell(spreadsheet_cell(text)) == text
