"""The memory estimate holds against measured allocations of the project's own training step."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the base is built once."""
    return tmp_path_factory.mktemp("memory")


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 4, "captions": 1, "checkpointing": False},
        {"batch": 4, "captions": 5, "checkpointing": True},
        {"batch": 2, "captions": 1, "checkpointing": False, "dropout": 0.0},
    ],
    ids=["plain rows", "shared rows, checkpointing", "no dropout"],
)
def test_the_estimate_is_within_a_tenth_of_what_a_cpu_allocates(root, changes):
    from benchmarks.memory import Cell, measure

    measured = measure(Cell(base="replica", dtype="float32", **changes), root, "cpu")
    assert measured["ratio"] == pytest.approx(1, abs=0.1), measured
