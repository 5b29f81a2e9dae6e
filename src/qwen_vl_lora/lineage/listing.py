"""Runs side by side: outcome, the settings that are not the same, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_lora.lineage.comparison import flatten
from qwen_vl_lora.lineage.records import Record

_METRICS = {
    "loss": ("training_summary", "last_loss"),
    "validation loss": ("training_summary", "best_validation_loss"),
    "CIDEr base": ("caption_metrics", "base.CIDEr"),
    "CIDEr tuned": ("caption_metrics", "tuned.CIDEr"),
    "BLEU-4 tuned": ("caption_metrics", "tuned.BLEU-4"),
    "ROUGE-L tuned": ("caption_metrics", "tuned.ROUGE-L"),
}


def differing_keys(records: Sequence[Record]) -> list[str]:
    """Dotted keys of the parameters that are not the same in all runs."""
    trees = [flatten(record.facts.get("parameters", {})) for record in records]
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    return [name for name in names if len({repr(tree.get(name)) for tree in trees}) > 1]


def metrics_of(record: Record) -> dict[str, float]:
    """The few numbers that tell runs apart, of those that the run measured."""
    results: Mapping[str, Any] = record.facts.get("results", {})
    flat = {artifact: flatten(values) for artifact, values in results.items()}
    values = {name: flat.get(artifact, {}).get(key) for name, (artifact, key) in _METRICS.items()}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def setting(record: Record, key: str) -> str:
    """One parameter as text; `–` where the run did not know it."""
    return str(flatten(record.facts.get("parameters", {})).get(key, "–"))
