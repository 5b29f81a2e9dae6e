"""Training by several ranks: what they are told, and what the first of them gives back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.devices import choose_device
from qwen_vl_lora.modeling.parent import ParentAdapter
from qwen_vl_lora.modeling.plain import (
    base_model_of,
    images_of,
    plain_base_model,
    plain_images,
    plain_settings,
    settings_of,
)
from qwen_vl_lora.parameters import LauncherParameters
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.launching import Task, portable, run_on_ranks
from qwen_vl_lora.ranks.working import tell_row
from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.tuning.data import TrainingData
from qwen_vl_lora.tuning.fit import FittedAdapter, OnLog, train
from qwen_vl_lora.tuning.settings import TrainingSettings


def train_on_ranks(
    base_model: BaseModel,
    data: TrainingData,
    settings: TrainingSettings,
    parent: ParentAdapter | None,
    job_folder: Path,
    checkpoint: Path | None,
    on_log: OnLog | None,
    launcher: LauncherParameters,
    workspace: Path,
) -> FittedAdapter:
    """As `fit.train`, by all ranks together."""
    task: Task = {
        "base_model": plain_base_model(base_model),
        "images": plain_images(data.images),
        "store": portable(data.store.root),
        "train": list(data.train),
        "validation": list(data.validation),
        "settings": plain_settings(settings),
        "parent": {"place": parent.place, "path": portable(parent.adapter.path)} if parent else None,
        "job_folder": portable(job_folder),
        "checkpoint": portable(checkpoint) if checkpoint else None,
        "tells_rows": on_log is not None,
    }
    fitted, *_ = run_on_ranks(train_rank, task, launcher, choose_device(settings.device), workspace, on_log)
    left_out = [Rejection(**rejection) for rejection in fitted.pop("left_out")]
    return FittedAdapter(**{**fitted, "directory": Path(fitted["directory"]), "left_out": left_out})


def train_rank(task: Task) -> dict[str, Any] | None:
    """One rank's part of the training."""
    data = TrainingData(images_of(task["images"]), FeatureStore(Path(task["store"])), task["train"], task["validation"])
    parent = task["parent"]
    fitted = train(
        base_model_of(task["base_model"]),
        data,
        settings_of(TrainingSettings, task["settings"]),
        ParentAdapter(parent["place"], Adapter(Path(parent["path"]))) if parent else None,
        Path(task["job_folder"]),
        Path(task["checkpoint"]) if task["checkpoint"] else None,
        tell_row if task["tells_rows"] and here.is_first() else None,
    )
    if not here.is_first():
        return None
    left_out = [dataclasses.asdict(rejection) for rejection in fitted.left_out]
    return {
        "directory": portable(fitted.directory),
        "log": fitted.log,
        "summary": fitted.summary,
        "preview": fitted.preview,
        "left_out": left_out,
    }
