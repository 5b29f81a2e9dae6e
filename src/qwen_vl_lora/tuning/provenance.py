"""What decides an adapter's bits, and what its record says made it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from typing import Any

from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.modeling.base_model import BaseModel, digest
from qwen_vl_lora.modeling.devices import choose_device
from qwen_vl_lora.modeling.parent import ParentAdapter
from qwen_vl_lora.tuning.data import TrainingData
from qwen_vl_lora.tuning.settings import TrainingSettings

Record = dict[str, Any]


def job_inputs(
    base_model: BaseModel,
    data: TrainingData,
    settings: TrainingSettings,
    parent: ParentAdapter | None,
    ranks: int,
    threads: int,
) -> Record:
    """Everything that decides the adapter's bits: an unfinished run resumes only where all of it is equal."""
    return {
        "base_model": base_model.fingerprint,
        "train_conversations": digest(list(data.train)),
        "validation_conversations": digest(list(data.validation)),
        "image": settings.image.model_dump(include={"resized_height", "resized_width", "min_pixels", "max_pixels"}),
        "max_length": settings.max_length,
        "lora": settings.lora.model_dump(),
        "training_args": settings.training_args.model_dump(),
        "vision": settings.vision,
        "rows": settings.rows,
        "device": choose_device(settings.device).type,
        "attention": settings.attention,
        "quantization": settings.quantization,
        "image_features": _feature_key(base_model, settings),
        "init_adapter": parent.sha256 if parent else None,
        "ranks": ranks,
        "threads": threads,
        "packages": _packages(settings),
    }


def _feature_key(base_model: BaseModel, settings: TrainingSettings) -> str | None:
    """Of the stored features that are trained on: it covers the libraries that make them."""
    if settings.vision == "adapted":
        return None
    return FeatureKey.of(base_model, settings.image, settings.training_args.dtype).digest


def _packages(settings: TrainingSettings) -> dict[str, str]:
    quantizing = () if settings.quantization is None else ("bitsandbytes",)
    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", *quantizing):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # whoever loads the base says it better
            found[name] = importlib.metadata.version(name)
    return found


def adapter_record(
    base_model: BaseModel, data: TrainingData, settings: TrainingSettings, parent: ParentAdapter | None
) -> Record:
    """What made this adapter, and how it wants to be asked."""
    return {
        "base_model": {
            "name": base_model.name,
            "revision": base_model.revision,
            "fingerprint": base_model.fingerprint,
            "files": base_model.files,
        },
        "prompt": settings.prompt.model_dump(),
        "image": settings.image.model_dump(),
        "generation": settings.generation.model_dump(),
        "max_length": settings.max_length,
        "vision": settings.vision,
        "rows": settings.rows,
        "attention": settings.attention,
        "quantization": settings.quantization,
        "lora": settings.lora.model_dump(),
        "training_args": settings.training_args.model_dump(),
        "parent": parent.describe() if parent else None,
        "data": {
            "train_conversations": {"sha256": digest(list(data.train)), "samples": len(data.train)},
            "validation_conversations": {"sha256": digest(list(data.validation)), "samples": len(data.validation)},
        },
    }
