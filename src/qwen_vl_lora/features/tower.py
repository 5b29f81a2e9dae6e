"""Running the frozen vision tower over pictures, shard by shard."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.features.store import SHARD_SUFFIX
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.model.pictures import pixel_inputs
from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.runs.storage import file_sha256, temporary
from qwen_vl_lora.samples.image_store import ImageStore

if TYPE_CHECKING:
    import torch

_CUT_PICTURES = 512
"""Batches are cut anew after so many pictures, so that they do not depend on what is stored already."""
SHARD_PICTURES = (8, 512)
"""Fewest and most pictures of a shard; eight shards give several processes an even share of a small set."""
# Patches of one forward pass: enough to fill the device, little enough to keep memory flat.
_PATCHES = {"cpu": 4096, "cuda": 65536}


class Encoder:
    """Runs the tower over pictures and writes a shard of their features. It can be pickled until its first call.

    Args:
        staging: folder for finished shards.
    """

    def __init__(
        self,
        images: ImageStore,
        base_model: BaseModel,
        image: ImageParameters,
        dtype: str,
        device: torch.device,
        staging: Path,
    ) -> None:
        self._images = images
        self._base_model = base_model
        self._image = image
        self._dtype = dtype
        self._device = device.type
        self._staging = staging

    def __call__(self, batches: list[list[str]]) -> int:
        """Encode pictures, named by sha256. Returns their number."""
        encoder, tower = self._loaded
        features: dict[str, torch.Tensor] = {}
        for batch, inputs in _read_ahead(iter(batches), encoder):
            encoded = _run_tower(tower, self._base_model.family, inputs, encoder.sizer.merge_size)
            features.update(zip(batch, encoded, strict=True))
        _write_shard(features, self._staging)
        return len(features)

    @functools.cached_property
    def _loaded(self) -> tuple[ChatEncoder, Any]:
        from qwen_vl_lora.features.fast_tower import quicken  # imports torch

        tower = self._base_model.load_vision_tower(self._dtype, choose_device(self._device))
        return self._encoder(), quicken(tower)

    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self._base_model.load_processor(), self._image, self._images)

    def pieces(self, names: Sequence[str]) -> Iterator[list[list[str]]]:
        """The batches of each shard."""
        encoder = self._encoder()
        fewest, most = SHARD_PICTURES
        enough = min(max(fewest, len(names) // 8), most)
        for start in range(0, len(names), _CUT_PICTURES):
            shard: list[list[str]] = []
            for batch in _batches(names[start : start + _CUT_PICTURES], encoder, self._device):
                shard.append(batch)
                if sum(map(len, shard)) >= enough:
                    yield shard
                    shard = []
            if shard:
                yield shard


def _batches(names: Sequence[str], encoder: ChatEncoder, device: str) -> Iterator[list[str]]:
    """Names in order, cut so that no batch holds more patches than the device likes."""
    batch: list[str] = []
    patches = 0
    for name in names:
        entry = encoder.images.by_sha256(name)
        _, down, across = encoder.sizer.grid(entry.width, entry.height)
        if batch and patches + down * across > _PATCHES[device]:
            yield batch
            batch, patches = [], 0
        batch.append(name)
        patches += down * across
    if batch:
        yield batch


def _read_ahead(
    batches: Iterator[list[str]], encoder: ChatEncoder
) -> Iterator[tuple[list[str], dict[str, torch.Tensor]]]:
    """Each batch with its pixels, the next batch being read while this one is encoded."""
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as ahead:

        def pixels(batch: list[str]) -> dict[str, torch.Tensor]:
            return pixel_inputs(encoder.processor, encoder.sizer, list(readers.map(encoder.images.open, batch)))

        pending = None
        for batch in batches:
            following = (batch, ahead.submit(pixels, batch))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def _run_tower(tower: Any, family: Family, inputs: dict[str, torch.Tensor], merge_size: int) -> list[torch.Tensor]:
    import torch

    grid = inputs["image_grid_thw"]
    with torch.inference_mode():
        output = tower(inputs["pixel_values"].to(tower.device, tower.dtype), grid_thw=grid.to(tower.device))
        features = family.stored_features(output)
    lengths = (grid.prod(-1) // merge_size**2).tolist()
    if features.shape[-2] != sum(lengths):
        raise TrainingError(
            f"The vision tower gave {features.shape[-2]} features where {sum(lengths)} image tokens stand in the text; "
            "this combination of transformers and base model is not usable."
        )
    # clone: a slice would keep, and write, the whole batch's storage.
    return [part.cpu().clone() for part in features.split(lengths, dim=-2)]


def _write_shard(features: dict[str, torch.Tensor], staging: Path) -> None:
    from safetensors.torch import save_file

    partial = temporary(staging / "shard")  # processes of several machines write here at once
    save_file(features, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(staging / f"{file_sha256(partial)}{SHARD_SUFFIX}")
