from __future__ import annotations

import pytest

from qwen_vl_lora.evaluation.drawings import histogram, loss_curves
from qwen_vl_lora.pages.language import ENGLISH
from qwen_vl_lora.pages.page import signed, ticks


@pytest.mark.parametrize(
    ("highest", "most", "edges"),
    [(10, 12, list(range(11))), (0.9, 4, [0, 0.5, 1.0]), (0, 5, [0, 1]), (328, 5, [0, 100, 200, 300, 400])],
)
def test_steps_are_round_and_reach_the_highest(highest: float, most: int, edges: list[float]) -> None:
    assert list(ticks(highest, most)) == edges


def test_every_score_has_its_column_the_highest_too() -> None:
    bins, facets = histogram([0.0, 0.999, 1.0, 9.5, 10.0], "b0", ENGLISH)
    assert [bin.count for bin in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert facets == ["b0-0", "b0-0", "b0-1", "b0-9", "b0-9"]
    assert (bins[1].label, bins[1].percent) == ("CIDEr 1 to 2: 1 caption", 50)


def test_columns_of_small_scores_are_narrow() -> None:
    bins, _ = histogram([0.05, 0.3, 0.31], "b0", ENGLISH)
    assert [bin.tick for bin in bins] == ["0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]


def test_a_higher_loss_is_drawn_higher_and_a_later_step_further_right() -> None:
    rows = [{"step": 1, "loss": 4.0}, {"step": 10, "loss": 2.0}, {"step": 10, "validation_loss": 3.0}]
    curves = loss_curves(rows, ENGLISH)
    assert curves is not None
    (left, high), (right, low) = curves.lines["training"]
    assert left < right
    assert high < curves.lines["validation"][0][1] < low
    assert loss_curves([{"step": 1, "loss": 4.0}], ENGLISH) is None


@pytest.mark.parametrize(("value", "text"), [(-1e-9, "0.00"), (0.0, "0.00"), (-0.006, "−0.01"), (2, "+2.00")])
def test_a_value_that_is_shown_as_zero_has_no_sign(value: float, text: str) -> None:
    assert signed(value, 2) == text
