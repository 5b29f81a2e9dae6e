"""How much memory a training step takes, from sizes alone: no torch, no weights, no device.

All in bytes. `b` is 2 in half precision and 4 in float32, `h` the hidden size, `kv` the width of keys, `i` the inner
width of the MLP, `r` LoRA's rank, `n` LoRA's parameters, `t` tokens of one forward pass with padding, `V` the
vocabulary, `s` scored tokens, `k` positions whose logits are kept.

    peak    = max(weights + 12 n + max(forward, backward), weights + tower)
    weights = b x parameters, without the tower's: a training on stored features lets the tower go after loading;
              quantized projections 0.516 (nf4 with double quantization) or 1.004 (int8) bytes each
    12 n    = adapter in float32, and AdamW's two moments

    layer   = t (8 h + b (2 h + 2 kv) + 3 b i + r x modules x b + LoRA's inputs + LoRA's dropout masks)
              two norms in float32; queries, attention's output, keys and values (2 h in place of 2 kv where rows are
              shared or padded); gate, its activation and up
              LoRA's inputs with dropout: b x (inputs of each adapted module); without it they are shared (float32) or
              cast once for each (half precision). Masks: 1 byte for each input on a GPU, 4 on a CPU
    head    = V (4 k + 8 s), and in half precision at least 6 k V
              logits leave a half-precision model in float32 (autocast), and their gradient comes back in it

    scratch = b (i + h) t; in half precision at least 4 i t, or 8 i t with dropout
              LoRA is given its input in float32, and dropout makes another of it: the widest module's, for a moment

    without checkpointing:  forward  = layers x layer + b h t + head + half-precision copies of LoRA's weights (2 n)
                            backward = 4 n + scratch + layer
    with checkpointing:     forward  = layer + layers x b h t + copies + the larger of head and scratch
                            backward = the same as above, + b h t

The update itself needs nothing: AdamW is the fused one. Left out: the CUDA context (0.5 to 0.7 GiB outside torch's
count), the allocator's gaps, DoRA's scratch, and the activations of an adapted tower. `benchmarks/memory.py` compares
this with measured peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.modeling.geometry import Geometry
from qwen_vl_lora.parameters import LoraParameters
from qwen_vl_lora.tuning.rows import Row, plan_passes

CONTEXT_BYTES = 600 * 2**20
"""CUDA's context and libraries, which torch does not count."""

GAPS = 1.06
"""Reserved over allocated memory of torch's caching allocator, as a factor; a convention, not measured here."""

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_BYTES_OF_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1 + 4 / 1024}


@dataclass(frozen=True)
class PassShape:
    """What one forward pass holds.

    Attributes:
        tokens: rows times the longest row: padding is computed too.
        scored: tokens of its answers.
        kept: rows times the positions whose logits are computed.
        masked: rows of several answers, or of several lengths, which want a mask.
    """

    tokens: int
    scored: int
    kept: int
    masked: bool

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> PassShape:
        """As the collator pads them."""
        lengths = [row.length for row in rows]
        answers = max(row.length - row.prompt_length for row in rows)
        return cls(
            tokens=len(rows) * max(lengths),
            scored=sum(int(member.scored.sum()) for row in rows for member in row.members),
            kept=len(rows) * (answers + 1),
            masked=len(set(lengths)) > 1 or any(len(row.members) > 1 for row in rows),
        )


@dataclass(frozen=True)
class MemoryModel:
    """Estimates for one model and one way of training it.

    Attributes:
        dtype: precision of frozen weights and arithmetic.
        adapted: (inputs, outputs) of every LoRA module of one layer.
        mask_bytes: of one dropped-out number: 1 on a GPU, 4 on a CPU.
        tower: whether the vision tower stays in memory.
    """

    geometry: Geometry
    dtype: str
    quantization: str | None
    rank: int
    dropout: float
    adapted: tuple[tuple[int, int], ...]
    checkpointing: bool
    mask_bytes: int = 1
    tower: bool = False

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        lora: LoraParameters,
        dtype: str,
        *,
        checkpointing: bool,
        quantization: str | None = None,
        mask_bytes: int = 1,
        tower: bool = False,
    ) -> MemoryModel:
        adapted = tuple(geometry.projections[name] for name in adapted_projections(geometry, lora.target_modules))
        return cls(geometry, dtype, quantization, lora.r, lora.lora_dropout, adapted, checkpointing, mask_bytes, tower)

    @property
    def lora_parameters(self) -> int:
        return self.geometry.layers * self.rank * sum(inputs + outputs for inputs, outputs in self.adapted)

    @property
    def weights(self) -> int:
        """The frozen base while it trains."""
        return self._loaded - (0 if self.tower else BYTES_OF_DTYPE[self.dtype] * self.geometry.vision_parameters)

    @property
    def _loaded(self) -> int:
        """The whole base, as it comes from the disk."""
        size = BYTES_OF_DTYPE[self.dtype]
        quantized = self.geometry.layers * self.geometry.projection_parameters if self.quantization else 0
        kept = (self.geometry.parameters - quantized) * size
        return round(kept + quantized * _BYTES_OF_QUANTIZED[self.quantization] if self.quantization else kept)

    def step(self, shape: PassShape) -> int:
        """What a step takes besides the frozen weights: adapter, moments, gradients, activations."""
        return 12 * self.lora_parameters + max(self._forward(shape), self._backward(shape))

    def peak(self, shape: PassShape) -> int:
        """Largest allocation of a training, as torch counts it."""
        return max(self.weights + self.step(shape), self._loaded)

    def needed(self, shape: PassShape) -> int:
        """What a GPU must have free: the peak, the allocator's gaps and CUDA's context."""
        return round(self.peak(shape) * GAPS) + CONTEXT_BYTES

    def _forward(self, shape: PassShape) -> int:
        size = BYTES_OF_DTYPE[self.dtype]
        inputs = size * self.geometry.hidden * shape.tokens
        logits = 4 * shape.kept + 8 * shape.scored
        head = self.geometry.vocabulary * (max(6 * shape.kept, logits) if size == 2 else logits)
        copies = 2 * self.lora_parameters if size == 2 else 0
        if self.checkpointing:
            return self._layer(shape) + self.geometry.layers * inputs + max(head, self._scratch(shape)) + copies
        return self.geometry.layers * self._layer(shape) + inputs + head + copies

    def _backward(self, shape: PassShape) -> int:
        size = BYTES_OF_DTYPE[self.dtype]
        scratch = self._scratch(shape)
        if self.quantization:  # a layer's weights come back to full precision where they are used
            scratch += size * self.geometry.inner * self.geometry.hidden
        inputs = size * self.geometry.hidden * shape.tokens if self.checkpointing else 0
        return self._layer(shape) + inputs + scratch + 4 * self.lora_parameters

    def _scratch(self, shape: PassShape) -> int:
        """What the widest part of a layer needs for a moment, beside what is kept."""
        plain = BYTES_OF_DTYPE[self.dtype] * (self.geometry.inner + self.geometry.hidden)
        if self.dtype == "float32":
            return plain * shape.tokens
        widest = max(inputs for inputs, _ in self.adapted)
        return max(plain, (8 if self.dropout else 4) * widest) * shape.tokens

    def _layer(self, shape: PassShape) -> int:
        """Activations that one layer keeps for its backward pass."""
        size, hidden = BYTES_OF_DTYPE[self.dtype], self.geometry.hidden
        keys_and_values = 2 * (hidden if shape.masked else self.geometry.key_values)
        plain = 8 * hidden + size * (2 * hidden + keys_and_values + 3 * self.geometry.inner)
        ranks = size * self.rank * len(self.adapted)
        return shape.tokens * (plain + ranks + self._lora_inputs())

    def _lora_inputs(self) -> int:
        """Of one token in one layer: what LoRA's first matrices keep, and dropout's masks."""
        size, inputs = BYTES_OF_DTYPE[self.dtype], sum(inputs for inputs, _ in self.adapted)
        if self.dropout:
            return inputs * (size + self.mask_bytes)
        if size == 2:
            return inputs * size
        return size * (3 * self.geometry.hidden + self.geometry.inner)  # two normed inputs, attention, MLP: each once


@dataclass(frozen=True)
class Change:
    """What could be set otherwise, and what a GPU would then have to have free."""

    setting: str
    bytes: int


def largest_pass(
    conversations: Sequence[EncodedConversation],
    rows: Literal["shared", "separate"],
    captions_per_step: int,
    batch_size: int,
) -> PassShape:
    """The largest forward pass that a step of the longest conversations is cut into."""
    longest = sorted(conversations, key=lambda conversation: len(conversation.ids), reverse=True)[:captions_per_step]
    shapes = [PassShape.of_rows(forward) for forward in plan_passes(longest, rows, batch_size)]
    return max(shapes, key=lambda shape: (shape.tokens, shape.scored))


def changes(model: MemoryModel, shape_of: Callable[[int], PassShape], batch_size: int, per_step: int) -> list[Change]:
    """What takes less memory, mildest first, each with its figure; the optimizer step stays the same in all.

    Args:
        shape_of: the largest pass by captions of one forward pass.
        batch_size: captions of one forward pass now.
        per_step: captions of one optimizer step.
    """
    found = []
    if not model.checkpointing:
        lighter = replace(model, checkpointing=True)
        found.append(Change("training_args.gradient_checkpointing: true", lighter.needed(shape_of(batch_size))))
    if batch_size > 1:
        for size in sorted({batch_size // 2, 1}, reverse=True):
            setting = (
                f"training_args.per_device_train_batch_size: {size}, gradient_accumulation_steps: {per_step // size}"
            )
            found.append(Change(setting, model.needed(shape_of(size))))
    if model.dtype == "float32":
        lighter = replace(model, dtype="bfloat16")
        found.append(Change("training_args.bf16: true", lighter.needed(shape_of(batch_size))))
    if model.quantization is None:
        lighter = replace(model, quantization="nf4")
        found.append(Change("quantization: nf4", lighter.needed(shape_of(batch_size))))
    half = "bfloat16" if model.dtype == "float32" else model.dtype
    least = replace(model, checkpointing=True, quantization=model.quantization or "nf4", dtype=half)
    if len(found) > 1:
        found.append(Change("all of these", least.needed(shape_of(1))))
    return found


def adapted_projections(geometry: Geometry, target_modules: Sequence[str] | str) -> list[str]:
    """Which of the seven projections a list of LoRA targets reaches, by suffix as PEFT matches; all for a pattern."""
    if isinstance(target_modules, str):
        return list(geometry.projections)
    return [name for name in geometry.projections if name in {target.rpartition(".")[2] for target in target_modules}]
