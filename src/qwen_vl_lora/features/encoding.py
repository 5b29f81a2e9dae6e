"""Running the frozen vision tower once per distinct picture.

Finished shards wait in the workspace, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import SHARD_SUFFIX, FeatureStore, ImageFeatures, StagedShards
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.fingerprints import file_sha256
from qwen_vl_lora.modeling.pictures import PictureSizer, pixel_inputs
from qwen_vl_lora.parameters import ImageParameters, LauncherParameters
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.launching import count_ranks
from qwen_vl_lora.samples.image_store import ImageStore

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SHARD_PICTURES = 512
# Patches of one forward pass: enough to fill the device, little enough to keep memory flat.
_PATCHES = {"cpu": 4096, "cuda": 65536}


def encode_pictures(
    images: ImageStore,
    base_model: BaseModel,
    image: ImageParameters,
    dtype: str,
    device: torch.device,
    store: FeatureStore,
    staging: Path,
    launcher: LauncherParameters | None = None,
) -> StagedShards:
    """Encode those pictures that the store does not hold yet.

    Args:
        images: all pictures of the run.
        staging: folder in the workspace for finished shards, one per key.
        launcher: how many processes share it; None encodes in this one.

    Returns:
        The new shards, still in `staging`; their union with the store covers `images`.
    """
    key = FeatureKey.of(base_model, image, dtype)
    workspace, staging = staging.parent, staging / key.digest
    staging.mkdir(parents=True, exist_ok=True)
    store.drop_damaged(key)
    _drop_damaged_leftovers(staging)
    wanted = store.features(key).missing(entry.sha256 for entry in images)
    wanted = ImageFeatures(staging).missing(wanted)
    if wanted:
        logger.info("Encoding %d of %d pictures; the others are stored.", len(wanted), len(images))
        if launcher is None or count_ranks(launcher, device) == 1:
            encode_share(wanted, images, base_model, image, dtype, device, staging)
        else:
            from qwen_vl_lora.features.launcher import encode_on_ranks

            encode_on_ranks(wanted, images, base_model, image, dtype, device, staging, launcher, workspace)
    else:
        logger.info("All %d pictures are encoded already.", len(images))
    return StagedShards(key, tuple(sorted(staging.glob(f"*{SHARD_SUFFIX}"))))


def encode_share(
    sha256s: list[str],
    images: ImageStore,
    base_model: BaseModel,
    image: ImageParameters,
    dtype: str,
    device: torch.device,
    staging: Path,
) -> None:
    """Encode this process's share of the pictures: of all batches, every n-th, so that ranks cut no batch anew."""
    from tqdm import tqdm

    processor = base_model.load_processor()
    sizer = PictureSizer.for_processor(processor, image)
    tower = base_model.load_vision_tower(dtype, device)
    numbers = itertools.count()
    quiet = None if here.is_first() else True
    with tqdm(total=len(sha256s), desc="encode_images", unit="image", leave=False, disable=quiet) as bar:
        for start in range(0, len(sha256s), SHARD_PICTURES):
            names = sha256s[start : start + SHARD_PICTURES]
            features: dict[str, torch.Tensor] = {}
            batches = _batches(names, images, sizer, device.type)
            mine = (batch for batch in batches if next(numbers) % here.world_size() == here.rank())
            for batch, inputs in _read_ahead(mine, images, processor, sizer):
                here.note(f"encoding pictures from {start} on")
                features.update(zip(batch, _run_tower(tower, inputs, sizer), strict=True))
                bar.update(len(batch) * here.world_size())
            if features:
                _write_shard(features, staging)


def _batches(names: Sequence[str], images: ImageStore, sizer: PictureSizer, device: str) -> Iterator[list[str]]:
    """Names in order, cut so that no batch holds more patches than the device likes."""
    batch: list[str] = []
    patches = 0
    for name in names:
        entry = images.by_sha256(name)
        _, down, across = sizer.grid(entry.width, entry.height)
        if batch and patches + down * across > _PATCHES[device]:
            yield batch
            batch, patches = [], 0
        batch.append(name)
        patches += down * across
    if batch:
        yield batch


def _read_ahead(
    batches: Iterator[list[str]], images: ImageStore, processor: Any, sizer: PictureSizer
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """Each batch with its pixels, the next batch being read while this one is encoded."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as ahead:

        def pixels(batch: list[str]) -> dict[str, torch.Tensor]:
            return pixel_inputs(processor, sizer, list(readers.map(images.open, batch)))

        pending = None
        for batch in batches:
            following = (batch, ahead.submit(pixels, batch))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def _run_tower(tower: Any, inputs: dict[str, torch.Tensor], sizer: PictureSizer) -> list[torch.Tensor]:
    import torch

    grid = inputs["image_grid_thw"]
    with torch.inference_mode():
        merged = tower(inputs["pixel_values"].to(tower.device, tower.dtype), grid_thw=grid.to(tower.device))
    lengths = (grid.prod(-1) // sizer.merge_size**2).tolist()
    features = merged.pooler_output
    if features.shape[0] != sum(lengths):
        raise TrainingError(
            f"The vision tower gave {features.shape[0]} features where {sum(lengths)} image tokens stand in the text; "
            "this combination of transformers and base model is not usable."
        )
    # clone: a slice would keep, and write, the whole batch's storage.
    return [part.cpu().clone() for part in features.split(lengths)]


def _write_shard(features: dict[str, torch.Tensor], staging: Path) -> None:
    from safetensors.torch import save_file

    partial = staging / f".{uuid.uuid4().hex}.partial"  # ranks of several machines write here at once
    save_file(features, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(staging / f"{file_sha256(partial)}{SHARD_SUFFIX}")


def _drop_damaged_leftovers(staging: Path) -> None:
    """Remove finished shards that a power loss damaged; a partial one of another process is not ours to touch."""
    for path in staging.glob(f"*{SHARD_SUFFIX}"):
        if file_sha256(path) != path.stem:
            path.unlink(missing_ok=True)
