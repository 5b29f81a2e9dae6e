"""How pictures reach the model: as stored features, or as pixels when the tower is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore, ImageFeatures
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.pictures import PictureSizer, pixel_inputs
from qwen_vl_lora.samples.image_store import ImageStore


class PictureInputs(Protocol):
    """How pictures reach the model."""

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of the model for pictures named by sha256, in reading order."""


@dataclass(frozen=True)
class StoredPictures:
    """Pictures as features of the frozen tower, through transformers' own door for them."""

    features: ImageFeatures

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if not names:
            return {}
        output = BaseModelOutputWithPooling(pooler_output=tuple(self.features.get(name) for name in names))
        return {"mm_encoder_outputs": {"image": output}}


@dataclass(frozen=True)
class PixelPictures:
    """Pictures as pixels, for a tower that is trained."""

    images: ImageStore
    processor: Any
    sizer: PictureSizer

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        if not names:
            return {}
        return dict(pixel_inputs(self.processor, self.sizer, [self.images.open(name) for name in names]))


def choose_pictures(
    vision: str,
    base_model: BaseModel,
    store: FeatureStore,
    images: ImageStore,
    dtype: str,
    processor: Any,
    sizer: PictureSizer,
) -> PictureInputs:
    """Stored features for a frozen tower, pixels for an adapted one."""
    if vision == "adapted":
        return PixelPictures(images, processor, sizer)
    return StoredPictures(store.features(FeatureKey.of(base_model, sizer.image, dtype)))
