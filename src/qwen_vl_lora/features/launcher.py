"""Encoding pictures by several ranks: each writes shards of its own into the shared workspace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_lora.features.encoding import encode_share
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.devices import choose_device
from qwen_vl_lora.modeling.plain import base_model_of, images_of, plain_base_model, plain_images
from qwen_vl_lora.parameters import ImageParameters, LauncherParameters
from qwen_vl_lora.ranks.launching import Task, portable, run_on_ranks
from qwen_vl_lora.samples.image_store import ImageStore

if TYPE_CHECKING:
    import torch


def encode_on_ranks(
    sha256s: Sequence[str],
    images: ImageStore,
    base_model: BaseModel,
    image: ImageParameters,
    dtype: str,
    device: torch.device,
    staging: Path,
    launcher: LauncherParameters,
    workspace: Path,
) -> None:
    """As `encoding.encode_share` with all pictures, by all ranks together."""
    task: Task = {
        "sha256s": list(sha256s),
        "images": plain_images(images),
        "base_model": plain_base_model(base_model),
        "image": image.model_dump(),
        "dtype": dtype,
        "device": device.type,
        "staging": portable(staging),
    }
    run_on_ranks(encode_rank, task, launcher, device, workspace, None)


def encode_rank(task: Task) -> None:
    """One rank's part of the pictures."""
    encode_share(
        task["sha256s"],
        images_of(task["images"]),
        base_model_of(task["base_model"]),
        ImageParameters.model_validate(task["image"]),
        task["dtype"],
        choose_device(task["device"]),
        Path(task["staging"]),
    )
