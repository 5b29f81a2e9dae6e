"""The facts in a report about an adapter, read from the adapter's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_vl_lora.evaluation.report import ReportFacts
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.shipped_base import note_on_base
from qwen_vl_lora.samples.tally import sentence


def facts_of(adapter: Adapter, num_images: int, caption_statistics: Mapping[str, Any]) -> ReportFacts:
    """The facts of the run that made `adapter`.

    Args:
        num_images: held-out pictures that were captioned.
        caption_statistics: of the data; those of earlier versions lack the rejected rows.
    """
    collected = caption_statistics.get("collection")
    record = adapter.record
    lora, training = record["lora"], record["training"]
    run = record.get("run", {})
    note = note_on_base(record)
    return ReportFacts(
        name=run.get("recipe") or adapter.path.parent.name,
        created=run.get("id", ""),
        base_model=record["base_model"]["name"],
        adapter={
            "rank r": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            "target modules": lora["target_modules"],
            "trainable parameters": training["trainable_parameters"],
            "vision tower": record["vision"],
        },
        data={
            "training captions": record["data"]["train_conversations"]["samples"],
            "validation captions": record["data"]["validation_conversations"]["samples"],
            "held-out images": num_images,
            **({} if collected is None else {"source": sentence(collected)}),
        },
        settings=_settings(record),
        lineage={
            "run": run.get("id"),
            "base model fingerprint": record["base_model"]["fingerprint"],
            "training data": record["data"],
            "dataset versions": run.get("read", {}),
        },
        notes=[] if note is None else [note],
        made=_made(run, training),
        curve=training.get("curve", ()),
    )


def _made(run: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """When, for how long, where and from which commit the adapter was trained, as far as its record says."""
    device = str(run.get("device") or "cpu").removeprefix("cuda: ")
    machine = f"{run.get('cpu')}, {run.get('cores')} cores" if device == "cpu" else device
    recorded = run.get("git")
    git = recorded if isinstance(recorded, Mapping) else {}
    changes = " with local changes" if git.get("dirty") else ""
    parts = [
        f"trained {str(run['started'])[:10]}" if run.get("started") else "",
        f"in {duration(seconds)}" if (seconds := training.get("seconds")) is not None else "",
        f"on {machine}" if run.get("cpu") else "",
        f"from commit {str(git['commit'])[:12]}{changes}" if git.get("commit") else "",
    ]
    return " ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


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
