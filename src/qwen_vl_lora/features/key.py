"""Which features are the same features: everything that turns a picture's bytes into numbers."""

from __future__ import annotations

import importlib.metadata
from dataclasses import asdict, dataclass

from qwen_vl_lora.modeling.base_model import BaseModel, digest
from qwen_vl_lora.parameters import ImageParameters

FORMAT = 1
"""Raised when what is stored for a picture changes."""

# Resampling, normalisation and the tower's own arithmetic live in these.
_LIBRARIES = ("torch", "torchvision", "transformers", "qwen-vl-utils", "pillow")


@dataclass(frozen=True)
class FeatureKey:
    """One folder of the feature store. Pictures inside are told apart by the sha256 of their bytes."""

    vision_fingerprint: str
    resized_height: int | None
    resized_width: int | None
    min_pixels: int | None
    max_pixels: int | None
    dtype: str
    libraries: tuple[str, ...]
    format: int = FORMAT

    @classmethod
    def of(cls, base_model: BaseModel, image: ImageParameters, dtype: str) -> FeatureKey:
        return cls(
            vision_fingerprint=base_model.vision_fingerprint,
            resized_height=image.resized_height,
            resized_width=image.resized_width,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
            dtype=dtype,
            libraries=tuple(f"{name}=={importlib.metadata.version(name)}" for name in _LIBRARIES),
        )

    @property
    def digest(self) -> str:
        """Name of the folder: 16 hex digits."""
        return digest(asdict(self))[:16]
