"""The facts in a report about an adapter, read from the adapter's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vl_lora.evaluation.report import ReportFacts
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.shipped_base import note_on_base
from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.samples.tally import sentence


def facts_of(
    adapter: Adapter, num_images: int, caption_statistics: Mapping[str, Any], language: Language = ENGLISH
) -> ReportFacts:
    """The facts of the run that made `adapter`.

    Args:
        num_images: held-out pictures that were captioned.
        caption_statistics: of the data; those of earlier versions lack the rejected rows.
    """
    collected = caption_statistics.get("collection")
    record = adapter.record
    lora, training = record["lora"], record["training"]
    run = record.get("run", {})
    note = note_on_base(record, language)
    return ReportFacts(
        name=run.get("recipe") or adapter.path.parent.name,
        created=run.get("id", ""),
        base_model=record["base_model"]["name"],
        adapter={
            language("fact_rank"): lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            language("fact_targets"): lora["target_modules"],
            language("fact_trainable"): training["trainable_parameters"],
            language("fact_tower"): language(f"tower_{record['vision']}"),
        },
        data={
            language("fact_training_captions"): record["data"]["train_conversations"]["samples"],
            language("fact_validation_captions"): record["data"]["validation_conversations"]["samples"],
            language("fact_held_out"): num_images,
            **({} if collected is None else {language("fact_source"): sentence(collected, language)}),
        },
        settings=_settings(record),
        lineage={
            language("run"): run.get("id"),
            language("fact_fingerprint"): record["base_model"]["fingerprint"],
            language("fact_data"): record["data"],
            language("fact_versions"): run.get("read", {}),
        },
        notes=[] if note is None else [note],
        made=_made(run, training, language),
        curve=training.get("curve", ()),
    )


def _made(run: Mapping[str, Any], training: Mapping[str, Any], language: Language) -> str:
    """When, for how long, where and from which commit the adapter was trained, as far as its record says."""
    device = str(run.get("device") or "cpu").removeprefix("cuda: ")
    machine = language("made_cores", cpu=run.get("cpu"), cores=run.get("cores")) if device == "cpu" else device
    recorded = run.get("git")
    git = recorded if isinstance(recorded, Mapping) else {}
    commit = "made_from_changed_commit" if git.get("dirty") else "made_from_commit"
    seconds = training.get("seconds")
    parts = [
        language("made_on_day", day=language.date(str(run["started"]))) if run.get("started") else "",
        language("made_in", duration=language.duration(seconds)) if seconds is not None else "",
        language("made_on_machine", machine=machine) if run.get("cpu") else "",
        language(commit, commit=str(git["commit"])[:12]) if git.get("commit") else "",
    ]
    return language("between_facts").join(filter(None, parts))


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": record["prompt"],
        "image": record["image"],
        "generation": record["generation"],
        "max_length": record["max_length"],
        "rows": record["rows"],
        "training_args": record["training_args"],
        "training": {name: value for name, value in record["training"].items() if name != "curve"},
    }
