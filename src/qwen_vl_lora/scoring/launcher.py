"""Captions by several ranks: each writes its share of the batches, the first gives the joined table."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.devices import choose_device
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
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.named_pictures import LoosePictures
from qwen_vl_lora.scoring.comparison import compare_captions
from qwen_vl_lora.scoring.inference import Captioner, CaptionNotes, caption_missing
from qwen_vl_lora.scoring.settings import CaptionSettings


def compare_on_ranks(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    store: FeatureStore,
    records: Sequence[dict[str, Any]],
    settings: CaptionSettings,
    workspace: Path,
    launcher: LauncherParameters,
) -> pd.DataFrame:
    """As `comparison.compare_captions`, by all ranks together."""
    task: Task = {
        "base_model": plain_base_model(base_model),
        "adapter": portable(adapter.path),
        "images": plain_images(images),
        "store": portable(store.root),
        "records": list(records),
        "settings": plain_settings(settings),
    }
    table, *_ = run_on_ranks(compare_rank, task, launcher, choose_device(settings.device), workspace, None)
    return pd.DataFrame(table)


def compare_rank(task: Task) -> dict[str, list[str]] | None:
    """One rank's part of the captions; the first rank's result is whole."""
    table = compare_captions(
        base_model_of(task["base_model"]),
        Adapter(Path(task["adapter"])),
        images_of(task["images"]),
        FeatureStore(Path(task["store"])),
        task["records"],
        settings_of(CaptionSettings, task["settings"]),
    )
    return {str(name): column.tolist() for name, column in table.items()} if here.is_first() else None


def caption_on_ranks(
    captioner: Captioner,
    images: LoosePictures,
    missing: Sequence[str],
    notes: Path,
    workspace: Path,
    launcher: LauncherParameters,
) -> None:
    """As `inference.caption_missing`, by all ranks together; the first notes the captions in the file."""
    sources = {sha256: images.sources[sha256] for sha256 in missing}
    task: Task = {
        "base_model": plain_base_model(captioner.base_model),
        "adapter": portable(captioner.adapter.path) if captioner.adapter else None,
        "settings": plain_settings(captioner.settings),
        "entries": [list(images.by_sha256(sha256)) for sha256 in missing],
        "files": {name: portable(source) for name, source in sources.items() if isinstance(source, Path)},
        "bytes": {name: b64encode(source).decode() for name, source in sources.items() if isinstance(source, bytes)},
        "missing": list(missing),
        "notes": portable(notes),
    }
    run_on_ranks(caption_rank, task, launcher, choose_device(captioner.settings.device), workspace, None)


def caption_rank(task: Task) -> None:
    """One rank's part of the captions."""
    adapter = Adapter(Path(task["adapter"])) if task["adapter"] else None
    captioner = Captioner(base_model_of(task["base_model"]), adapter, settings_of(CaptionSettings, task["settings"]))
    files = {name: Path(file) for name, file in task["files"].items()}
    inside = {name: b64decode(text) for name, text in task["bytes"].items()}
    images = LoosePictures([ImageEntry(*entry) for entry in task["entries"]], {**files, **inside})
    note = CaptionNotes(Path(task["notes"])).add if here.is_first() else lambda _: None
    caption_missing(captioner, images, task["missing"], note)
