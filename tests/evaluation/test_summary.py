from __future__ import annotations

import io
import re
from collections.abc import Callable

import pandas as pd
from rich.console import Console

from evaluation.rows import Row, with_contender
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.evaluation.summary import summarize_run
from qwen_vl_lora.pages.language import CHINESE
from qwen_vl_lora.parameters import ScoringParameters

Make = Callable[[list[Row]], pd.DataFrame]


def printed(table: pd.DataFrame, scoring: ScoringParameters, *notes: str, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(summarize_run(score_predictions(table, scoring)[0], table, notes))
    return console.export_text()


def test_the_summary_names_metrics_and_captions(make_predictions: Make, scoring: ScoringParameters) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"chatty answer {i}", f"a dog number {i}") for i in range(5)]
    text = printed(make_predictions(rows), scoring)
    assert "CIDEr" in text
    assert "chatty answer 2" in text
    assert "chatty answer 3" not in text
    assert "Metrics on 5 images mean little" in text
    assert re.search(r"exact match +│ +0 of 5 │ +5 of 5 │ +\+5", text)


def test_contenders_are_rows_beside_base_and_tuned(make_predictions: Make, scoring: ScoringParameters) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"chatty answer {i}", f"a dog number {i}") for i in range(5)]
    table = with_contender(make_predictions(rows), "older", ["a dog"] * 5)
    text = printed(table.assign(base_cut="false", tuned_cut="false", older_cut="true"), scoring)
    assert re.search(r"older +│ +0.000 │ +0\.\d+ │ +0 of 5 │ +\+10.000 \(\+10.000 … \+10.000\)", text)
    assert "5 of 5 captions of older were cut" in text


def test_what_does_not_differ_has_no_sign_and_is_called_no_difference(
    make_predictions: Make, scoring: ScoringParameters
) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"a cat number {i}", f"a cat number {i}") for i in range(60)]
    text = printed(make_predictions(rows), scoring)
    assert re.search(r"CIDEr +│ +\d\.\d+ │ +\d\.\d+ │ +0\.000 │ +0\.000 … 0\.000: no difference", text)
    assert "+0.000" not in text
    assert "-0.000" not in text


def test_captions_with_nothing_of_the_references_are_called_so(
    make_predictions: Make, scoring: ScoringParameters
) -> None:
    rows: list[Row] = [([f"dog number {i} runs"], "a a a a", "a white.") for i in range(60)]
    assert "no telling word in common with the references" in " ".join(printed(make_predictions(rows), scoring).split())
    rows[0] = (["dog number 0 runs"], "a a a a", "dog number 0 runs")
    assert "no telling word" not in printed(make_predictions(rows), scoring)


def test_a_note_on_the_base_is_shown_before_the_captions(make_predictions: Make, scoring: ScoringParameters) -> None:
    text = printed(make_predictions([(["a dog"], "a", "b")] * 2), scoring, "It knows drawings only.")
    assert text.index("It knows drawings only.") < text.index("image_0")


def test_a_text_without_blanks_is_folded_and_never_cut(make_predictions: Make, scoring: ScoringParameters) -> None:
    words = "一滴水落在平静的湖面上激起层层涟漪向四周散开"
    text = printed(make_predictions([([words], words, words)] * 2), scoring, width=60)
    assert "…" not in text.partition("image_0")[2]
    assert all(text.count(character) >= 6 for character in words)


def test_the_summary_in_chinese_has_no_english_word(make_predictions: Make, scoring: ScoringParameters) -> None:
    table = make_predictions([(["一只狗"], "一只猫", "一只狗")] * 5).assign(base_cut=["true"] * 5, tuned_cut="false")
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(summarize_run(score_predictions(table, scoring)[0], table, (), CHINESE))
    text = console.export_text()
    assert "微调前的 5 条描述中，5 条在 generation.max_new_tokens 处截断。" in text
    names = r"\w+\.\w+|base_model|image_\d|epoch|ptb"
    assert re.findall("[a-z]{2,}", re.sub(names, "", text)) == []


def test_the_summary_counts_captions_that_were_cut(make_predictions: Make, scoring: ScoringParameters) -> None:
    rows: list[Row] = [([f"a dog number {i}"], f"chatty answer {i}", f"a dog number {i}") for i in range(5)]
    plain = make_predictions(rows)
    assert "were cut" not in printed(plain, scoring)
    table = plain.assign(base_cut=["true"] * 5, tuned_cut="false")
    assert "5 of 5 base captions were cut at generation.max_new_tokens." in printed(table, scoring)


def test_of_one_picture_the_summary_says_that_cider_is_0(make_predictions: Make, scoring: ScoringParameters) -> None:
    text = printed(make_predictions([(["a dog"], "a dog", "a dog")]), scoring)
    assert "CIDEr cannot be anything but 0" in " ".join(text.split())


def test_brackets_in_captions_are_no_markup(make_predictions: Make, scoring: ScoringParameters) -> None:
    assert "[bold]a dog[/bold] [/]" in printed(make_predictions([(["a dog"], "[bold]a dog[/bold] [/]", "x")]), scoring)
