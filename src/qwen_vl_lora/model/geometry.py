"""The sizes of a model and its parameter counts. A family reads them from config.json, without torch or weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinearAttention:
    """Sizes of the layers whose attention is linear, with a recurrent state (Gated DeltaNet).

    Attributes:
        layers: how many there are.
        heads: of the values; queries and keys are repeated to as many.
        key, value: width of one head.
        mixed: width of queries, keys and values together, before they are repeated.
    """

    layers: int
    heads: int
    key: int
    value: int
    mixed: int


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, named as in config.json where those names are clear.

    Attributes:
        queries: width of queries, and of attention's output.
        key_values: width of keys, and of values.
        inner: width inside the language model's MLP.
        tied: whether the output layer is the embedding.
        projections: linear layers of the language model that LoRA can adapt, over all its layers: name → count,
            inputs, outputs.
        projections_rest: number of the other parameters of its layers: biases, norms, convolutions.
        normed: width of all that the norms of one layer of the language model get.
        tower: the layers of the vision tower that LoRA can adapt, by the ends of their names: name → count, inputs,
            outputs.
        tower_rest: number of the other parameters of the tower.
        feature_levels: number of tensors (image tokens, hidden) for a picture in the language model.
        linear: the layers with linear attention among `layers`, if there are any; `queries`, `key_values` and `normed`
            are those of the other layers.
        unloaded: number of parameters in a published checkpoint that the model does not load.
    """

    hidden: int
    layers: int
    queries: int
    key_values: int
    inner: int
    vocabulary: int
    tied: bool
    projections: Mapping[str, tuple[int, int, int]]
    projections_rest: int
    normed: int
    tower: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    tower_rest: int = 0
    feature_levels: int = 1
    linear: LinearAttention | None = None
    unloaded: int = 0

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.projection_parameters + self.projections_rest + self.kept_parameters

    @property
    def projection_parameters(self) -> int:
        """Parameters of the language model's linear layers, which LoRA adapts and nf4 or int8 packs."""
        return _weights(self.projections)

    @property
    def kept_parameters(self) -> int:
        """Parameters outside the language model's layers: embeddings, output layer, tower."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden + self.vision_parameters

    @property
    def vision_parameters(self) -> int:
        """Parameters of the tower with its merger."""
        return _weights(self.tower) + self.tower_rest


def _weights(layers: Mapping[str, tuple[int, int, int]]) -> int:
    return sum(count * inputs * outputs for count, inputs, outputs in layers.values())


def usual_projections(
    layers: int, hidden: int, queries: int, key_values: int, inner: int
) -> dict[str, tuple[int, int, int]]:
    """The linear layers of a decoder with plain attention and a gated MLP: name → count, inputs, outputs."""
    return {
        "q_proj": (layers, hidden, queries),
        "k_proj": (layers, hidden, key_values),
        "v_proj": (layers, hidden, key_values),
        "o_proj": (layers, queries, hidden),
        "gate_proj": (layers, hidden, inner),
        "up_proj": (layers, hidden, inner),
        "down_proj": (layers, inner, hidden),
    }
