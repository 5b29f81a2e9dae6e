"""The interface of a model family to the rest of the code."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.model.geometry import Geometry

if TYPE_CHECKING:
    import torch

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_TOKEN, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
"""Tokens of the chat format, the same in all families of Qwen. A picture is image tokens between two markers."""


def pooled_features(output: Any) -> torch.Tensor:
    """The stored features of a family with one tensor for each picture: (image tokens, hidden)."""
    features: torch.Tensor = output.pooler_output
    return features


def pooled_output(features: Sequence[torch.Tensor]) -> Any:
    """The tower's output, rebuilt from `pooled_features` of each picture."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=tuple(features))


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: for messages.
        model_type: in config.json.
        patch_size: px; side of one patch of the vision tower.
        merge_size: patches merged into one image token along each side.
        default_system: system text that the chat template adds to a conversation without one, or None.
        sizes: reads `Geometry` from a parsed config.json, in the current form (`text_config`) or the flat one;
            a KeyError names a missing key.
        published: hub id → keys of config.json that `sizes` reads, so that a plan needs no download.
        tower: path of the vision tower in the loaded model.
        language_model: path of the language model there.
        answer_start: text that the chat template puts before the last answer while thinking is off.
        unquantized: ends of the names of linear layers in the language model that nf4 and int8 leave as they are.
        linear_attention: ends of the names of the linear layers in layers with linear attention.
        shares_rows: whether all layers use a 4-D attention mask, so that answers can share a row.
        stored_features: the tower's output → features of all its pictures together: (image tokens, hidden), or
            (feature levels, image tokens, hidden) with several levels.
        tower_output: stored features of each picture → the model's `mm_encoder_outputs["image"]`: only tensors in
            nested tuples.
    """

    name: str
    model_type: str
    patch_size: int
    merge_size: int
    default_system: str | None
    sizes: Callable[[Mapping[str, Any]], Geometry]
    published: Mapping[str, Mapping[str, Any]]
    tower: str = "model.visual"
    language_model: str = "model.language_model"
    answer_start: str = ""
    unquantized: tuple[str, ...] = ()
    linear_attention: tuple[str, ...] = ()
    shares_rows: bool = True
    stored_features: Callable[[Any], torch.Tensor] = pooled_features
    tower_output: Callable[[Sequence[torch.Tensor]], Any] = pooled_output

    @property
    def token_side(self) -> int:
        """px; side of the square that one image token represents. A picture's sides are multiples of it."""
        return self.patch_size * self.merge_size

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The sizes of a model, from its config.json.

        Raises:
            BaseModelError: naming a missing key.
        """
        try:
            return self.sizes(config)
        except KeyError as error:
            raise BaseModelError(f"config.json lacks {error}; expected the config.json of a {self.name}.") from error

    def published_geometry(self, name: str) -> Geometry:
        """The sizes of a published checkpoint by its hub id."""
        return self.geometry(self.published[name])

    def tower_of(self, model: Any) -> Any:
        """The vision tower of a loaded model, which no adapter wraps."""
        return model.get_submodule(self.tower)

    def language_model_of(self, model: Any) -> Any:
        """The language model of a loaded model, which no adapter wraps."""
        return model.get_submodule(self.language_model)

    def drop_tower(self, model: Any) -> None:
        """Free the tower's memory. The model then takes pictures only as stored features."""
        setattr(self.above_tower_of(model), self.tower_name, None)

    def above_tower_of(self, model: Any) -> Any:
        """The part of a loaded model that holds the tower and puts its output between the texts."""
        return model.get_submodule(self.tower.rpartition(".")[0])

    @property
    def tower_name(self) -> str:
        """The last part of the tower's path."""
        return self.tower.rpartition(".")[2]

    @property
    def tower_modules(self) -> str:
        """A regular expression for the whole names of the tower's modules, as adapter_config.json excludes them."""
        return rf"(.*\.)?{re.escape(self.tower_name)}\..*"

    def is_in_tower(self, name: str) -> bool:
        """Whether a module or parameter is the tower or a part of it."""
        return f".{self.tower_name}." in f".{name}."

    def name_in_tower(self, tensor: str) -> str | None:
        """A stored tensor's name inside the tower, in any form (see `published_tensor`); None outside it."""
        for start in (f"{self.tower}.", f"{self.tower_name}."):
            if tensor.startswith(start):
                return tensor.removeprefix(start)
        return None

    def published_tensor(self, tensor: str) -> str:
        """A stored tensor's name in the form of the published checkpoints; newer ones write the whole path."""
        inner = self.name_in_tower(tensor)
        if inner is not None:
            return f"{self.tower_name}.{inner}"
        return re.sub(rf"^({re.escape(self.language_model)}|language_model\.model)\.", "model.", tensor)
