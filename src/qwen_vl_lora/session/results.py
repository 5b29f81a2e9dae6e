"""What a run says at its end: figures first, then where the results are, what was left out, and what to do next."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from qwen_vl_lora.faults import shown_bytes
from qwen_vl_lora.pages.language import ENGLISH, Language, Setting, choose_language, language_of_page
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.records import REPORTING
from qwen_vl_lora.runs.storage import size, temporary
from qwen_vl_lora.session.console import say, terminal

LATEST = ("comparison_report", "comparison_sheet", "predictions", "caption_sheet", "captions", "data_page")
"""Datasets whose newest version is found below `latest/` too."""


_ENDS: Mapping[str, Mapping[str, str]] = {
    "comparison_report": {
        "page": "comparison_report",
        "table": "predictions",
        "sheet": "comparison_sheet",
        "adapter": "adapter",
    },
    "captions": {"table": "captions", "sheet": "caption_sheet"},
    "merged_model": {"model": "merged_model"},
    "adapter": {"adapter": "adapter"},
    "train_conversations": {"page": "data_page", "pictures": "image_sheet"},
}
"""Dataset with which a run ends → what is shown then: name for a reader → dataset."""


def tell_results(pipeline: Pipeline, catalog: CatalogProtocol, project: Path, recipe: str) -> None:
    """Print the results of a finished run, and let `latest/` point at them.

    Args:
        recipe: whose `data/08_reporting/<recipe>/latest/` is brought up to date.
    """
    outputs = pipeline.all_outputs()
    end = next((dataset for dataset in _ENDS if dataset in outputs), None)
    if end is None:
        return
    language = _language(end, catalog)
    for figures in _figures(end, catalog, language):
        terminal().print(figures)
    say("")
    for name, dataset in _ENDS[end].items():
        if path := _path(catalog, dataset):
            shown = relative(path, Path.cwd())
            whole = language("end_size", path=shown, size=shown_bytes(size(path))) if path.is_dir() else shown
            say(language(f"end_{name}", path=whole))
    if found := [path for name in LATEST if name in outputs and (path := _path(catalog, name))]:
        latest = project / REPORTING / recipe / "latest"
        point_at(found, latest)
        say(language("end_latest", path=f"{relative(latest, Path.cwd())}/"))
    if checks := list(_checks(outputs, catalog, language)):
        say(language("end_check", checks=language.join(checks)))
    say(language(f"next_{end}"))


def _language(end: str, catalog: CatalogProtocol) -> Language:
    """The language of the page or card that the run wrote; of inference, what `report.language` says of its captions.

    English where there is none of these.
    """
    if end == "captions":
        settings = catalog.get("params:settings")
        setting: Setting = settings.load().report.language if settings else "auto"
        captions = [] if _path(catalog, end) is None else catalog[end].load()["caption"].dropna()
        return choose_language(setting, map(str, captions))
    path = _path(catalog, "data_page" if end == "train_conversations" else end)
    if path is None or end not in ("adapter", "merged_model"):
        return ENGLISH if path is None else language_of_page(path.read_text(encoding="utf-8"))
    from qwen_vl_lora.model.model_card import CARD_FILE, language_of_card

    card = path / CARD_FILE
    return (language_of_card(card.read_text(encoding="utf-8")) if card.is_file() else None) or ENGLISH


def _figures(dataset: str, catalog: CatalogProtocol, language: Language) -> Iterator[Any]:
    if dataset == "comparison_report":
        from qwen_vl_lora.evaluation.summary import summarize_run
        from qwen_vl_lora.model.shipped_base import note_on_base

        note = note_on_base(catalog["adapter"].load().record, language)
        metrics, predictions = (catalog[name].load() for name in ("caption_metrics", "predictions"))
        yield summarize_run(metrics, predictions, [] if note is None else [note], language)
    elif dataset == "adapter":
        summary = catalog["training_summary"].load()
        losses = [summary[name] for name in ("first_loss", "last_loss", "validation_loss")]
        first, last, validation = ("–" if loss is None else f"{loss:.4f}" for loss in losses)
        yield language("trained_steps", steps=summary["steps"], first=first, last=last, validation=validation)


def _checks(outputs: set[str], catalog: CatalogProtocol, language: Language) -> Iterator[str]:
    """Yield what a user should look at: rows, near-duplicates and samples that were left out."""
    if "collection_summary" in outputs:
        summary = catalog["collection_summary"].load()
        if rejected := sum(summary["rejected"].values()):
            text = language("check_rejected", count=rejected, rows=summary["rows"])
            yield _with_path(text, catalog, "rejected_samples", language)
    if "split_summary" in outputs and (count := catalog["split_summary"].load()["near_duplicates"]["count"]):
        yield _with_path(language("check_alike", count=count), catalog, "split_summary", language)
    if "left_out_samples" in outputs and (count := len(catalog["left_out_samples"].load())):
        yield _with_path(language("check_long", count=count), catalog, "left_out_samples", language)


def _with_path(text: str, catalog: CatalogProtocol, name: str, language: Language) -> str:
    path = _path(catalog, name)
    return language("check_where", text=text, path=relative(path, Path.cwd())) if path else text


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
