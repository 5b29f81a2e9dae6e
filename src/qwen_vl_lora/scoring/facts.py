"""What a report says about an adapter, read from the adapter's own record."""

from __future__ import annotations

from typing import Any

from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.scoring.report import ReportFacts


def facts_of(adapter: Adapter, num_images: int) -> ReportFacts:
    """The facts of the run that made `adapter`.

    Args:
        num_images: held-out pictures that were captioned.
    """
    record = adapter.record
    lora, training = record["lora"], record["training"]
    run = record.get("run", {})
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
        },
        settings=_settings(record),
        lineage={
            "run": run.get("id"),
            "base model fingerprint": record["base_model"]["fingerprint"],
            "training data": record["data"],
            "dataset versions": run.get("read", {}),
        },
    )


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": record["prompt"],
        "image": record["image"],
        "generation": record["generation"],
        "max_length": record["max_length"],
        "rows": record["rows"],
        "training_args": record["training_args"],
        "training": record["training"],
    }
