"""Lengths are medians of words, and a loop is a phrase three times in a row."""

from __future__ import annotations

import pytest

from evaluation.rows import table_of, with_contender
from qwen_vl_lora.evaluation.lengths import has_loop, is_long, main_metric, measure_lengths
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.evaluation.wording import words_of


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("a cat and a cat and a cat and a dog", True),
        ("a cat and a cat and a dog", False),  # twice
        ("very very Very big", True),
        ("the end, the end. The end!", True),
        ("a b c d a b c d a b c", False),  # one word short of three times
        ("x a b c d a b c d a b c d y", True),
        ("一只猫一只猫一只猫", True),
        ("一只猫和一只猫", False),
        ("", False),
        (" ".join(map(str, range(33))) * 1, False),
        (" ".join([*map(str, range(32))] * 3), True),
        (" ".join([*map(str, range(33))] * 3), False),  # a phrase of 33 words is not looked for
    ],
)
def test_a_phrase_of_up_to_32_words_three_times_in_a_row_is_a_loop(text: str, loops: bool) -> None:
    assert has_loop(words_of(text)) is loops


def test_lengths_are_medians_and_loops_are_counted_for_each_side() -> None:
    table = table_of(
        [
            (["a red dog", "a dog here now"], "one two", "go go go"),
            (["cat"], "one, two, three!", ""),
            (["a b c d e"], "one", "x y x y x y"),
        ]
    )
    predictions = read_predictions(with_contender(table, "older", ["一只猫", "狗", "狗"]))
    assert measure_lengths(predictions, ["base", "tuned", "older"]) == {
        "words": {"references": 3.5, "base": 2.0, "tuned": 3.0, "older": 1.0},
        "loops": {"base": 0, "tuned": 2, "older": 0},
    }


@pytest.mark.parametrize(("words", "metric"), [(40.0, "CIDEr"), (40.5, "ROUGE-L")])
def test_cider_is_told_first_for_short_references_only(words: float, metric: str) -> None:
    metrics = {"words": {"references": words}}
    assert main_metric(metrics) == metric
    assert is_long(metrics) is (metric == "ROUGE-L")
    assert main_metric({}) == "CIDEr"  # of an older version
