"""The memory estimate holds against measured allocations of the project's own training step."""

from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
HYBRID = {
    "hidden_size": 640,
    "intermediate_size": 2304,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 256,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    },
}
"""A quarter of the width of Qwen3.5-4B, with its heads and proportions."""


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


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
)
def test_the_estimate_counts_linear_attention(root, processor, dtype, checkpointing):
    from benchmarks.memory import Cell, measure

    from tiny_models import save_tiny_base

    base = root / "bases" / f"hybrid-{dtype}"
    if not base.is_dir():
        base.parent.mkdir(exist_ok=True)
        save_tiny_base(base, processor, "qwen3_5", **HYBRID)
    cell = Cell(base="hybrid", dtype=dtype, batch=2, captions=1, checkpointing=checkpointing, side=288)
    measured = measure(cell, root, "cpu")
    assert measured["ratio"] == pytest.approx(1, abs=0.15), measured
