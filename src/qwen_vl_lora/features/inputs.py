"""How pictures reach the model: as stored features, or as pixels when the tower is trained."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore, ImageFeatures
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.families import Family

Item = TypeVar("Item")
Read = TypeVar("Read")


class PictureInputs(Protocol):
    """How pictures reach the model."""

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of the model for pictures named by sha256, in reading order."""


@dataclass(frozen=True)
class StoredPictures:
    """Pictures as stored features of the frozen tower, by transformers' argument `mm_encoder_outputs`."""

    features: ImageFeatures
    family: Family

    def __call__(self, names: Sequence[str]) -> dict[str, Any]:
        if not names:
            return {}
        output = self.family.tower_output([self.features.get(name) for name in names])
        return {"mm_encoder_outputs": {"image": output}}


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Iterator[Read]:
    """What `read` gives for each item, in order; the next one is read in a thread meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        following: collections.deque[Future[Read]] = collections.deque()
        for item in items:
            following.append(reader.submit(read, item))
            if len(following) > 1:
                yield following.popleft().result()
        for last in following:
            yield last.result()


def blanked(inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's keyword arguments with every picture blank: zeros for its pixels or stored features."""
    names = {"pixel_values", "mm_encoder_outputs"}
    return {name: _zeros(value) if name in names else value for name, value in inputs.items()}


def _zeros(value: Any) -> Any:
    from transformers.utils.generic import ModelOutput

    if isinstance(value, ModelOutput):
        return type(value)(**{name: _zeros(part) for name, part in value.items()})
    if isinstance(value, dict):
        return {name: _zeros(part) for name, part in value.items()}
    return tuple(map(_zeros, value)) if isinstance(value, tuple) else value.new_zeros(value.shape)


def choose_pictures(
    vision: str, base_model: BaseModel, encoder: ChatEncoder, store: FeatureStore, dtype: str
) -> PictureInputs:
    """Stored features for a frozen tower, pixels for an adapted one."""
    if vision == "adapted":
        return encoder.pixels
    return StoredPictures(store.features(FeatureKey.of(base_model, encoder.sizer.image.size, dtype)), base_model.family)
