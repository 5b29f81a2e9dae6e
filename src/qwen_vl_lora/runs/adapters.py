"""The adapters that recorded runs trained: how good they are, and in words which one a command takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_lora.runs.comparison import flatten
from qwen_vl_lora.runs.records import Record

ADAPTER = "adapter"
_METRICS = "caption_metrics"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter on disk.

    Attributes:
        record: of the run that trained it.
        cider: of its newest evaluation, on the scale of 0 to 10; None if it was never evaluated.
        num_images: pictures of that evaluation.
    """

    record: Record
    cider: float | None = None
    num_images: int = 0

    @property
    def version(self) -> str:
        return str(self.record.complete_versions()[ADAPTER])

    @property
    def measured(self) -> str:
        """How good it is, in words."""
        if self.cider is None:
            return "never evaluated"
        return f"CIDEr {self.cider:.2f} on {self.num_images} pictures"


def trained_adapters(records: Sequence[Record], project: Path) -> list[TrainedAdapter]:
    """Return the adapters that recorded runs trained and that are still on disk.

    Args:
        records: oldest first.
    """
    found = {}
    for record in records:
        version = record.complete_versions().get(ADAPTER)
        if version and (project / str(record.written[ADAPTER].get("path"))).is_dir():
            found[record.recipe, version] = TrainedAdapter(record)
    for record in records:
        versions = {**record.read_versions(), **record.complete_versions()}
        key = record.recipe, versions.get(ADAPTER, "")
        measured = flatten(record.facts.get("results", {}).get(_METRICS, {}))
        if key in found and _METRICS in record.complete_versions() and "tuned.CIDEr" in measured:
            cider, images = measured["tuned.CIDEr"], measured.get("num_images", 0)
            found[key] = TrainedAdapter(found[key].record, cider, images)
    return list(found.values())


def best_adapter(adapters: Sequence[TrainedAdapter]) -> TrainedAdapter | None:
    """Return the adapter with the highest CIDEr, the newest of equals; None if none was evaluated."""
    evaluated = [adapter for adapter in adapters if adapter.cider is not None]
    return max(reversed(evaluated), key=lambda adapter: adapter.cider or 0.0, default=None)


def adapter_in_words(recipe: str, version: str, adapters: Sequence[TrainedAdapter], why: str, better: str) -> str:
    """Return one line: which adapter is taken, how good it is, why, and whether another one may be meant.

    Args:
        adapters: of all recipes, oldest first.
        why: the reason for this one, such as `newest of the recipe`.
        better: how to take another version of the recipe; `VERSION` stands for it.
    """
    own = [adapter for adapter in adapters if adapter.record.recipe == recipe]
    taken = next((adapter for adapter in own if adapter.version == version), None)
    line = f"Adapter: {version} of recipe {recipe}, {taken.measured if taken else 'never evaluated'} ({why})."
    best = best_adapter(own)
    if best is not None and best.version != version and (taken is None or (taken.cider or 0) < (best.cider or 0)):
        line += f" {best.version} has {best.measured}: {better.replace('VERSION', best.version)}."
    newest = adapters[-1] if adapters else None
    if newest is not None and newest.record.recipe != recipe:
        line += f" Recipe {newest.record.recipe} has a newer adapter."
    return line


def data_in_words(record: Record, version: str) -> str:
    """Return one line: which stored data are read, and from which source they were made.

    Args:
        record: of the run that made the data.
    """
    source = record.read.get("captioned_images", {})
    place = (
        source.get("path") or source.get("describe", {}).get("filepath") or source.get("type") or "an unknown source"
    )
    return f"Data: {version} of recipe {record.recipe}, made from {place}."
