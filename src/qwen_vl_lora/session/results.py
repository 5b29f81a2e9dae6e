"""What a run says at its end: figures first, then where the results are, what was left out, and what to do next."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from qwen_vl_lora.faults import shown_bytes
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.records import REPORTING
from qwen_vl_lora.runs.storage import size, temporary
from qwen_vl_lora.session.console import say, terminal

LATEST = ("comparison_report", "comparison_sheet", "predictions", "caption_sheet", "captions", "data_page")
"""Datasets whose newest version is found below `latest/` too."""


@dataclass(frozen=True)
class _End:
    """What a run that ends with a dataset shows.

    Attributes:
        shown: name for a reader → dataset.
        next: what to do now.
    """

    dataset: str
    shown: Mapping[str, str]
    next: str


_ENDS = (
    _End(
        "comparison_report",
        {"page": "comparison_report", "table": "predictions", "sheet": "comparison_sheet", "adapter": "adapter"},
        "open the page; caption your own picture: qwen-vl-lora caption path/to/photo.jpg",
    ),
    _End(
        "captions",
        {"table": "captions", "sheet": "caption_sheet"},
        "open the sheet; the table has a reason for each picture without a caption",
    ),
    _End("merged_model", {"model": "merged_model"}, "use it: its README.md and docs/export.md show how"),
    _End("adapter", {"adapter": "adapter"}, "kedro run --pipeline evaluation, with the same --env and --params"),
    _End(
        "train_conversations",
        {"page": "data_page", "pictures": "image_sheet"},
        "kedro run --pipelines training,evaluation, with the same --env and --params",
    ),
)


def tell_results(pipeline: Pipeline, catalog: CatalogProtocol, project: Path, recipe: str) -> None:
    """Print the results of a finished run, and let `latest/` point at them.

    Args:
        recipe: whose `data/08_reporting/<recipe>/latest/` is brought up to date.
    """
    outputs = pipeline.all_outputs()
    end = next((one for one in _ENDS if one.dataset in outputs), None)
    if end is None:
        return
    for figures in _figures(end.dataset, catalog):
        terminal().print(figures)
    say("")
    for name, dataset in end.shown.items():
        if path := _path(catalog, dataset):
            total = f" ({shown_bytes(size(path))})" if path.is_dir() else ""
            say(f"{name}: {relative(path, Path.cwd())}{total}")
    if found := [path for name in LATEST if name in outputs and (path := _path(catalog, name))]:
        latest = project / REPORTING / recipe / "latest"
        point_at(found, latest)
        say(f"always the newest: {relative(latest, Path.cwd())}/")
    if checks := list(_checks(outputs, catalog)):
        say(f"check: {', '.join(checks)}")
    say(f"next: {end.next}")


def _figures(dataset: str, catalog: CatalogProtocol) -> Iterator[Any]:
    if dataset == "comparison_report":
        from qwen_vl_lora.evaluation.summary import summarize_run
        from qwen_vl_lora.model.shipped_base import note_on_base

        note = note_on_base(catalog["adapter"].load().record)
        metrics, predictions = (catalog[name].load() for name in ("caption_metrics", "predictions"))
        yield summarize_run(metrics, predictions, [] if note is None else [note])
    elif dataset == "adapter":
        summary = catalog["training_summary"].load()
        losses = [summary[name] for name in ("first_loss", "last_loss", "best_validation_loss")]
        first, last, validation = ("–" if loss is None else f"{loss:.4f}" for loss in losses)
        yield f"{summary['steps']} steps: loss {first} → {last}, best validation loss {validation}"


def _checks(outputs: set[str], catalog: CatalogProtocol) -> Iterator[str]:
    """Yield what a user should look at: rows, near-duplicates and samples that were left out."""
    if "collection_summary" in outputs:
        summary = catalog["collection_summary"].load()
        if rejected := sum(summary["rejected"].values()):
            yield f"{rejected} of {summary['rows']} rows rejected{_where(catalog, 'rejected_samples')}"
    if "split_summary" in outputs and (count := catalog["split_summary"].load()["near_duplicates"]["count"]):
        yield f"{count} near-duplicates on two sides of the split{_where(catalog, 'split_summary')}"
    if "left_out_samples" in outputs and (count := len(catalog["left_out_samples"].load())):
        yield f"{count} samples longer than max_length left out{_where(catalog, 'left_out_samples')}"


def _where(catalog: CatalogProtocol, name: str) -> str:
    path = _path(catalog, name)
    return f" ({relative(path, Path.cwd())})" if path else ""


def _path(catalog: CatalogProtocol, name: str) -> Path | None:
    """Where a dataset lies; None where nothing made it, or where a catalog keeps it in another way."""
    dataset: Any = catalog[name]
    path: Path | None = dataset.existing_path() if hasattr(dataset, "existing_path") and dataset.exists() else None
    return path


def point_at(files: Iterable[Path], latest: Path) -> None:
    """Make a link of the same name in `latest` for each file; a copy where the filesystem has no links."""
    latest.mkdir(parents=True, exist_ok=True)
    for file in files:
        made = temporary(latest / file.name)
        try:
            made.symlink_to(os.path.relpath(file, latest))
        except OSError:
            shutil.copyfile(file, made)
        made.replace(latest / file.name)
