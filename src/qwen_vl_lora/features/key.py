"""The key of stored features: everything that determines a picture's features besides its bytes."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.samples.image_files import DECODING

ONE_TENSOR, STACKED_LEVELS = 1, 2
"""The stored form of a picture: (image tokens, hidden), or (feature levels, image tokens, hidden)."""

ARITHMETIC = 2
"""Increase it when the same pixels and weights give other bits: 1 was the tower as transformers runs it."""

# These implement resampling, normalisation and the tower's arithmetic.
_LIBRARIES = ("torch", "torchvision", "transformers", "qwen-vl-utils", "pillow")

_OURS = ("libraries", "format", "decoding", "arithmetic")
"""Parts of a key that an upgrade changes."""


@dataclass(frozen=True)
class FeatureKey:
    """The key of one folder in the feature store. Inside, the sha256 of its bytes identifies a picture."""

    vision_fingerprint: str
    resized_height: int | None
    resized_width: int | None
    min_pixels: int | None
    max_pixels: int | None
    dtype: str
    libraries: tuple[str, ...]
    format: int = ONE_TENSOR
    decoding: int = DECODING
    arithmetic: int = ARITHMETIC

    @classmethod
    def of(cls, base_model: BaseModel, picture_size: Mapping[str, int | None], dtype: str) -> FeatureKey:
        """The key for pictures of `ImageParameters.size`."""
        return cls(
            vision_fingerprint=base_model.vision_fingerprint,
            resized_height=picture_size["resized_height"],
            resized_width=picture_size["resized_width"],
            min_pixels=picture_size["min_pixels"],
            max_pixels=picture_size["max_pixels"],
            dtype=dtype,
            libraries=tuple(f"{name}=={importlib.metadata.version(name)}" for name in _LIBRARIES),
            format=ONE_TENSOR if base_model.geometry.feature_levels == 1 else STACKED_LEVELS,
        )

    def superseded_parts(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs from a stored key that is equal in all that the user chooses; empty if more differs."""
        different = [name for name, value in json.loads(json.dumps(asdict(self))).items() if stored.get(name) != value]
        return different if set(different) <= set(_OURS) else []

    @property
    def digest(self) -> str:
        """Name of the folder: 16 hex digits."""
        return digest(asdict(self))[:16]
