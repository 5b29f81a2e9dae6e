"""The sizes of a Qwen2-VL or Qwen2.5-VL, and what follows from them. Reads config.json alone: no torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vl_lora.exceptions import BaseModelError

PATCH_VALUES = 3 * 2 * 14 * 14
"""Numbers of one patch: colours x frames (a still picture counts twice) x 14 x 14 pixels."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, by the names of config.json where they are clear.

    Attributes:
        key_values: width of keys, and of values.
        tied: the output layer is the embedding.
        vision_inner: width inside the tower's MLP.
        gated_vision: the tower's MLP has three layers and RMS norms (2.5-VL), not two and layer norms (2-VL).
    """

    hidden: int
    layers: int
    heads: int
    key_values: int
    inner: int
    vocabulary: int
    tied: bool
    vision_width: int
    vision_depth: int
    vision_inner: int
    gated_vision: bool
    patch_size: int = 14
    merge_size: int = 2

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Geometry:
        """From a parsed config.json, of today's form (`text_config`) or of the published checkpoints' flat one.

        Raises:
            BaseModelError: naming the key that is missing.
        """
        text, vision = config.get("text_config") or config, config.get("vision_config", {})
        gated = config.get("model_type") == "qwen2_5_vl"
        try:
            heads = text["num_attention_heads"]
            width = vision["hidden_size"] if gated else vision["embed_dim"]
            return cls(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=heads,
                key_values=text["hidden_size"] // heads * text["num_key_value_heads"],
                inner=text["intermediate_size"],
                vocabulary=text["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
                vision_width=width,
                vision_depth=vision["depth"],
                vision_inner=vision["intermediate_size"] if gated else int(width * vision.get("mlp_ratio", 4)),
                gated_vision=gated,
                patch_size=vision.get("patch_size", 14),
                merge_size=vision.get("spatial_merge_size", 2),
            )
        except KeyError as error:
            raise BaseModelError(f"config.json lacks {error}; is it that of a Qwen2-VL or Qwen2.5-VL?") from error

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        return self.layers * self.layer_parameters + self.kept_parameters

    @property
    def layer_parameters(self) -> int:
        """Of one layer of the language model."""
        biases_and_norms = self.hidden + 2 * self.key_values + 2 * self.hidden
        return self.projection_parameters + biases_and_norms

    @property
    def projection_parameters(self) -> int:
        """Of the seven linear layers of one layer: what LoRA adapts and quantization shrinks."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def kept_parameters(self) -> int:
        """Outside the language model's layers: embeddings, output layer, tower."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden + self.vision_parameters

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the seven linear layers."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, self.key_values),
            "v_proj": (self.hidden, self.key_values),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def vision_parameters(self) -> int:
        """Of the tower with its merger."""
        width, inner = self.vision_width, self.vision_inner
        merged = width * self.merge_size**2
        attention = 4 * width * width + 4 * width
        if self.gated_vision:
            block = attention + 3 * width * inner + 2 * inner + width + 2 * width
            norm = width
        else:
            block = attention + 2 * width * inner + inner + width + 4 * width
            norm = 2 * width
        merger = norm + merged * merged + merged + merged * self.hidden + self.hidden
        return PATCH_VALUES * width + self.vision_depth * block + merger


PUBLISHED = {
    "Qwen/Qwen2-VL-2B-Instruct": Geometry(1536, 28, 12, 256, 8960, 151_936, True, 1280, 32, 5120, False),
    "Qwen/Qwen2-VL-7B-Instruct": Geometry(3584, 28, 28, 512, 18_944, 152_064, False, 1280, 32, 5120, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": Geometry(2048, 36, 16, 256, 11_008, 151_936, True, 1280, 32, 3420, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": Geometry(3584, 28, 28, 512, 18_944, 152_064, False, 1280, 32, 3420, True),
}
"""From the config.json of each checkpoint, so that a plan needs no download."""
