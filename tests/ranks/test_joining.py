"""A further machine refuses a run that it cannot serve, and the run is told why."""

from __future__ import annotations

import pytest

from qwen_vl_lora.exceptions import LauncherError
from qwen_vl_lora.ranks.board import Board
from qwen_vl_lora.ranks.joining import take_part
from qwen_vl_lora.ranks.launching import versions


@pytest.fixture
def order(tmp_path):
    """What a run asks of its machines."""
    return {
        "launch": "l1",
        "work": "module:work",
        "device": "cpu",
        "nnodes": 2,
        "nproc_per_node": 1,
        "world_size": 2,
        "versions": versions(),
        "folder": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {**versions(), "peft": "0.1"}}, r"other versions than the run: peft 0\.1 there, \S+ here\."),
        ({"versions": {**versions(), "accelerate": "9"}}, "Install the same on all"),
        ({"folder": "not/here"}, "does not see the run's folder not/here"),
    ],
)
def test_a_run_that_this_machine_cannot_serve_is_refused_on_both_sides(order, changes, message):
    run = Board.hold()
    run.tell("launch/1", order | changes)

    with pytest.raises(LauncherError, match=message) as refusal:
        take_part(run.address, timeout=10)

    assert run.hear("failed/l1") == {"node": 1, "why": f"Machine 2: {refusal.value}"}


def test_a_machine_too_many_is_sent_away_and_the_run_goes_on(order):
    run = Board.hold()
    run.tell("launch/1", order | {"nnodes": 1})
    with pytest.raises(LauncherError, match=r"wants 1 machines \(launcher.nnodes\), and they are there already"):
        take_part(run.address, timeout=10)
    assert run.hear("failed/l1") is None
    assert run.count("left") == 1


def test_a_machine_that_comes_when_the_run_is_over_goes_again():
    run = Board.hold()
    run.tell("ended", False)
    assert take_part(run.address, timeout=10) is False


def test_a_run_that_never_comes_is_named():
    run = Board.hold()
    address = run.address
    del run
    with pytest.raises(LauncherError, match=rf"Nobody listens at {address} after 1 s"):
        take_part(address, timeout=1)
