"""Runs side by side: outcome, parameters that differ, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_vl_lora.runs.comparison import flatten
from qwen_vl_lora.runs.records import Record

_METRICS = {
    "loss": ("training_summary", "last_loss"),
    "validation loss": ("training_summary", "validation_loss"),
    "CIDEr base": ("caption_metrics", "base.CIDEr"),
    "CIDEr tuned": ("caption_metrics", "tuned.CIDEr"),
    "BLEU-4 tuned": ("caption_metrics", "tuned.BLEU-4"),
    "ROUGE-L tuned": ("caption_metrics", "tuned.ROUGE-L"),
}


def differing_keys(records: Sequence[Record]) -> list[str]:
    """Return the dotted keys of parameters that differ between the runs."""
    trees = [flatten(record.facts.get("parameters", {})) for record in records]
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    return [name for name in names if len({repr(tree.get(name)) for tree in trees}) > 1]


def changes(before: Record, record: Record) -> dict[str, Any]:
    """Return the dotted keys of parameters that differ from an earlier run, with their new values."""
    then, now = (flatten(one.facts.get("parameters", {})) for one in (before, record))
    return {name: now.get(name) for name in dict.fromkeys([*now, *then]) if now.get(name) != then.get(name)}


def metrics_of(record: Record) -> dict[str, float]:
    """Return the main figures that the run measured."""
    results: Mapping[str, Any] = record.facts.get("results", {})
    flat = {artifact: flatten(values) for artifact, values in results.items()}
    values = {name: flat.get(artifact, {}).get(key) for name, (artifact, key) in _METRICS.items()}
    if values["validation loss"] is None:  # a record of before this figure
        values["validation loss"] = flat.get("training_summary", {}).get("best_validation_loss")
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def setting(record: Record, key: str) -> str:
    """Return one parameter as text; `–` if the run did not have it."""
    return str(flatten(record.facts.get("parameters", {})).get(key, "–"))
