"""A table of predictions says of each caption whether it was cut, or says nothing of it."""

from __future__ import annotations

import io

import pandas as pd
import pytest

from evaluation.rows import table_of, with_contender
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import ScoringParameters

ROWS = [(["a dog"], "a chatty", "a dog"), (["a cat"], "another", "a"), (["a cow"], "a", "a cow")]


def with_cuts(base: list[object], tuned: list[object]) -> pd.DataFrame:
    return table_of(ROWS).assign(base_cut=base, tuned_cut=tuned)


def test_cuts_are_read_and_counted(scoring: ScoringParameters) -> None:
    table = with_cuts(["true", "true", "false"], ["false", "false", "true"])
    assert [(item.base_cut, item.tuned_cut) for item in read_predictions(table)] == [
        (True, False), (True, False), (False, True),
    ]  # fmt: skip
    assert score_predictions(table, scoring)[0]["cut_captions"] == {"base": 2, "tuned": 1}


@pytest.mark.parametrize("options", [{}, {"dtype": str, "keep_default_na": False}])
def test_cuts_stay_what_they_are_on_the_way_through_a_csv(options: dict[str, object]) -> None:
    table = with_cuts(["true", "TRUE", "False"], [False, False, True])
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)), **options)  # type: ignore[call-overload]
    assert [item.base_cut for item in read_predictions(read)] == [True, True, False]
    assert [item.tuned_cut for item in read_predictions(read)] == [False, False, True]


def test_a_table_of_an_older_version_says_nothing_of_cuts(scoring: ScoringParameters) -> None:
    table = table_of(ROWS)
    assert {item.tuned_cut for item in read_predictions(table)} == {None}
    assert score_predictions(table, scoring)[0]["cut_captions"] == {"base": None, "tuned": None}


def test_contenders_are_read_and_a_missing_caption_of_theirs_is_named() -> None:
    table = with_contender(with_cuts(["true"] * 3, ["false"] * 3), "older", ["a <b>cat</b>", "", "x"])
    item, empty, _ = read_predictions(table)
    assert item.contenders == {"older": ("a <b>cat</b>", False)}
    assert empty.contenders["older"].caption == ""
    assert (item.written("base").cut, item.written("older").caption) == (True, "a <b>cat</b>")
    with pytest.raises(DataFormatError, match="older_caption must be a text; got nan"):
        read_predictions(table.assign(older_caption=[None, "", "x"]))


def test_what_is_neither_true_nor_false_is_named() -> None:
    with pytest.raises(DataFormatError, match=r"image 'image_1': tuned_cut must be true or false; got 'perhaps'"):
        read_predictions(with_cuts(["true"] * 3, ["true", "perhaps", "false"]))
