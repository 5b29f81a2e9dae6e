"""Memory of a training step, estimated from sizes alone, without torch, weights or a device.

All in bytes. `b` is 2 in half precision and 4 in float32, `h` the hidden size, `q` the width of queries, `kv` that of
keys, `w` the width of all that a layer's norms get (2 h; with norms on queries and keys 2 h + q + kv), `i` the inner
width of the MLP, `r` LoRA's rank, `n` LoRA's parameters, `t` tokens of one forward pass with padding, `V` the
vocabulary, `s` scored tokens, `k` positions that have logits.

    peak    = max(weights + 12 n + max(forward, backward), weights + tower)
    weights = b x parameters, without the tower's: a training on stored features frees the tower after loading;
              quantized projections 0.516 (nf4 with double quantization) or 1.004 (int8) bytes each
    12 n    = adapter in float32, and AdamW's two moments

    layer   = t (4 w + b (2 q + 2 kv) + 3 b i + r x modules x b + LoRA's inputs + LoRA's dropout masks)
              norms in float32; queries, attention's output, keys and values (2 q in place of 2 kv where rows are
              shared or padded); gate, its activation and up; where layers differ, modules and LoRA's inputs are means
              LoRA's inputs with dropout: b x (inputs of each adapted module); without it they are shared (float32) or
              cast once for each (half precision). Masks: 1 byte for each input on a GPU, 4 on a CPU
    head    = V (4 k + 8 s), and in half precision at least 6 k V
              logits leave a half-precision model in float32 (autocast), and their gradient comes back in it

    scratch = b (i + h) t; in half precision at least 4 i t, or 8 i t with dropout
              LoRA gets its input in float32, and dropout copies it; only the widest module's copy counts

    skipped = (t - k) i (4 b, and the mask), of the last layer, whose MLP computes positions with logits only

    without checkpointing:  forward  = layers x layer - skipped + b h t + head + half-precision copies of LoRA (2 n)
                            backward = 4 n + scratch + layer
    with checkpointing:     forward  = layer + layers x b h t + copies + the larger of head and scratch
                            backward = the same as above, + b h t

The update itself needs no memory, because AdamW is fused. Left out: the CUDA context (0.5 to 0.7 GiB outside torch's
count), the allocator's gaps, DoRA's scratch, and the activations of an adapted tower. `benchmarks/memory.py` compares
this with measured peaks.

A layer with linear attention (Qwen3.5) keeps other tensors in place of queries, keys, values and attention's output.
`H` is the number of heads, `v` the width of all values, `d` the size of one head's state, `m` the width of queries,
keys and values before the heads, and `c` the tokens with every row padded to chunks of 64:

    in half precision  c (64 v + 4 m + 896 H + 8 H d / 64)    transformers' own code computes in float32 and keeps
    in float32         c (76 v + 8 m + 1316 H + 4 H d / 64)   copies in half precision; measured with Qwen3.5-4B's sizes

The layers with full attention there keep a gate and the gated output too: 4 q in place of 2 q. The package
flash-linear-attention, where it is installed, keeps less. With checkpointing the larger of the two kinds of layers
counts as `layer`; without, each kind as often as it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from qwen_vl_lora.exceptions import MachineError
from qwen_vl_lora.faults import is_out_of_memory, machine_fault, shown_bytes
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.model.geometry import Geometry
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.training.rows import Row, fullest_pass, longest

CONTEXT_BYTES = 600 * 2**20
"""Memory of CUDA's context and libraries, which torch does not count."""

GAPS = 1.06
"""Reserved over allocated memory of torch's caching allocator, as a factor; a convention, not measured here."""

PACKED_BASE = "quantization: nf4"
"""The setting with which the base needs the least memory."""

CHUNK = 64
"""Tokens that transformers' linear attention computes at once."""

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
_KEPT_BY_LINEAR_ATTENTION = {2: (64, 4, 896, 8), 4: (76, 8, 1316, 4)}
"""Bytes for one token, by the bytes of a number: times values, queries with keys and values, heads, states."""

_BYTES_OF_QUANTIZED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1 + 4 / 1024}


@dataclass(frozen=True)
class PassShape:
    """The size of one forward pass.

    Attributes:
        tokens: rows times the longest row, because padding is computed too.
        scored: tokens of the answers.
        kept: positions whose logits are computed; answers that share a prompt share its last position.
        rows: of the pass.
        masked: whether a row has several answers, which needs a mask.
    """

    tokens: int
    scored: int
    kept: int
    masked: bool
    rows: int = 1

    @property
    def chunked(self) -> int:
        """Tokens with each row padded to whole chunks of linear attention."""
        return self.rows * CHUNK * -(-self.tokens // (self.rows * CHUNK))

    @classmethod
    def of_rows(cls, rows: Sequence[Row]) -> PassShape:
        """The shape after the collator has padded the rows."""
        lengths = [row.length for row in rows]
        scored = sum(int(member.scored.sum()) for row in rows for member in row.members)
        return cls(
            tokens=len(rows) * max(lengths),
            scored=scored,
            kept=scored - sum(len(row.members) - 1 for row in rows),
            masked=any(len(row.members) > 1 for row in rows),
            rows=len(rows),
        )


@dataclass(frozen=True)
class MemoryModel:
    """Memory estimates for one model and its training settings.

    Attributes:
        dtype: precision of frozen weights and arithmetic.
        adapted: (how many, inputs, outputs) of every kind of LoRA module in the language model.
        adapted_tower: (how many, inputs, outputs) of every kind of LoRA module in the tower.
        mask_bytes: of dropout's mask for one number: 1 on a GPU, 4 on a CPU.
        tower: whether the vision tower stays in memory.
    """

    geometry: Geometry
    dtype: str
    quantization: str | None
    rank: int
    dropout: float
    adapted: tuple[tuple[int, int, int], ...]
    checkpointing: bool
    mask_bytes: int = 1
    tower: bool = False
    adapted_tower: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, geometry: Geometry, settings: Parameters, *, mask_bytes: int = 1) -> MemoryModel:
        """The model of a training with these settings."""
        lora, tower = settings.lora, settings.vision == "adapted"
        return cls(
            geometry,
            **settings.base_form,
            rank=lora.r,
            dropout=lora.lora_dropout,
            adapted=tuple(geometry.projections[name] for name in _reached(geometry.projections, lora.target_modules)),
            checkpointing=settings.training_args.gradient_checkpointing,
            mask_bytes=mask_bytes,
            tower=tower,
            adapted_tower=tuple(
                geometry.tower[name] for name in _reached(geometry.tower, lora.target_modules) if tower
            ),
        )

    @property
    def lora_parameters(self) -> int:
        modules = (*self.adapted, *self.adapted_tower)
        return self.rank * sum(count * (inputs + outputs) for count, inputs, outputs in modules)

    @property
    def weights(self) -> int:
        """Bytes of the frozen base during training."""
        return self._loaded - (0 if self.tower else BYTES_OF_DTYPE[self.dtype] * self.geometry.vision_parameters)

    @property
    def _loaded(self) -> int:
        """Bytes of the whole base as loaded."""
        size = BYTES_OF_DTYPE[self.dtype]
        quantized = self.geometry.projection_parameters if self.quantization else 0
        kept = (self.geometry.parameters - quantized) * size
        return round(kept + quantized * _BYTES_OF_QUANTIZED[self.quantization] if self.quantization else kept)

    def step(self, shape: PassShape) -> int:
        """Bytes of a step besides the frozen weights: adapter, moments, gradients, activations."""
        return 12 * self.lora_parameters + max(self._forward(shape), self._backward(shape))

    def peak(self, shape: PassShape) -> int:
        """Largest allocation of a training, as torch counts it."""
        return max(self.weights + self.step(shape), self._loaded)

    def needed(self, shape: PassShape) -> int:
        """Free bytes that a GPU needs: the peak, the allocator's gaps and CUDA's context."""
        return round(self.peak(shape) * GAPS) + CONTEXT_BYTES

    def _forward(self, shape: PassShape) -> int:
        size = BYTES_OF_DTYPE[self.dtype]
        inputs = size * self.geometry.hidden * shape.tokens
        logits = 4 * shape.kept + 8 * shape.scored
        head = self.geometry.vocabulary * (max(6 * shape.kept, logits) if size == 2 else logits)
        copies = 2 * self.lora_parameters if size == 2 else 0
        if self.checkpointing:
            return self._widest_layer(shape) + self.geometry.layers * inputs + max(head, self._scratch(shape)) + copies
        linear = self.geometry.linear.layers if self.geometry.linear else 0
        layers = (self.geometry.layers - linear) * self._layer(shape) + linear * self._linear_layer(shape)
        return layers - self._skipped(shape) + inputs + head + copies

    def _backward(self, shape: PassShape) -> int:
        size = BYTES_OF_DTYPE[self.dtype]
        scratch = self._scratch(shape)
        if self.quantization:  # a layer's weights are dequantized where they are used
            scratch += size * self.geometry.inner * self.geometry.hidden
        inputs = size * self.geometry.hidden * shape.tokens if self.checkpointing else 0
        return self._widest_layer(shape) + inputs + scratch + 4 * self.lora_parameters

    def _scratch(self, shape: PassShape) -> int:
        """Temporary bytes of the widest part of a layer, besides the stored activations."""
        plain = BYTES_OF_DTYPE[self.dtype] * (self.geometry.inner + self.geometry.hidden)
        if self.dtype == "float32":
            return plain * shape.tokens
        widest = max((inputs for _, inputs, _ in self.adapted), default=0)
        return max(plain, (8 if self.dropout else 4) * widest) * shape.tokens

    def _skipped(self, shape: PassShape) -> int:
        """Bytes that the last layer's MLP does not keep, because it computes positions with logits only."""
        size = BYTES_OF_DTYPE[self.dtype]
        lora_input = size + self.mask_bytes if self.dropout else size
        return (shape.tokens - shape.kept) * self.geometry.inner * (3 * size + lora_input)

    def _widest_layer(self, shape: PassShape) -> int:
        return max(self._layer(shape), self._linear_layer(shape))

    def _layer(self, shape: PassShape) -> int:
        """Activations that one layer keeps for its backward pass."""
        size, queries = BYTES_OF_DTYPE[self.dtype], self.geometry.queries
        keys_and_values = 2 * (queries if shape.masked else self.geometry.key_values)
        gates = 2 * (self.geometry.projections["q_proj"][2] - queries)  # Qwen3.5's, and its gated output
        norms = 4 * (self.geometry.normed - 2 * self.geometry.hidden)
        attention = norms + size * (2 * queries + keys_and_values + gates)
        return shape.tokens * (attention + self._outside_of_attention())

    def _linear_layer(self, shape: PassShape) -> int:
        """The same of a layer with linear attention; 0 without such layers."""
        linear = self.geometry.linear
        if linear is None:
            return 0
        values, states = linear.heads * linear.value, linear.heads * linear.key * linear.value // CHUNK
        kept = _KEPT_BY_LINEAR_ATTENTION[BYTES_OF_DTYPE[self.dtype]]
        parts = (values, linear.mixed, linear.heads, states)
        recurrence = sum(count * part for count, part in zip(kept, parts, strict=True))
        return shape.chunked * recurrence + shape.tokens * self._outside_of_attention()

    def _outside_of_attention(self) -> int:
        """Bytes for one token in one layer: the layer's two norms, the MLP, and what LoRA keeps."""
        size = BYTES_OF_DTYPE[self.dtype]
        ranks = size * self.rank * sum(count for count, _, _ in self.adapted) // self.geometry.layers
        return 8 * self.geometry.hidden + 3 * size * self.geometry.inner + ranks + self._lora_inputs()

    def _lora_inputs(self) -> int:
        """Bytes for one token in one layer: inputs that LoRA's first matrices keep, and dropout's masks."""
        size = BYTES_OF_DTYPE[self.dtype]
        inputs = sum(count * inputs for count, inputs, _ in self.adapted) // self.geometry.layers
        if self.dropout:
            return inputs * (size + self.mask_bytes)
        if size == 2:
            return inputs * size
        # Two normed inputs, attention's output, the MLP's inside: each once.
        return size * (2 * self.geometry.hidden + self.geometry.queries + self.geometry.inner)


@dataclass(frozen=True)
class Change:
    """A change of settings, and the free bytes that a GPU then needs."""

    setting: str
    bytes: int


def largest_pass(
    conversations: Sequence[EncodedConversation],
    rows: Literal["shared", "separate"],
    captions_per_step: int,
    batch_size: int,
) -> PassShape:
    """The largest forward pass of a step with the longest conversations."""
    return PassShape.of_rows(fullest_pass(longest(conversations, captions_per_step), rows, batch_size))


def changes(model: MemoryModel, shape_of: Callable[[int], PassShape], batch_size: int, per_step: int) -> list[Change]:
    """Changes that save memory, the mildest first, each with its figure. None changes the optimizer step.

    Args:
        shape_of: largest pass for a number of captions of one forward pass.
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
        found.append(Change(PACKED_BASE, lighter.needed(shape_of(batch_size))))
    half = "bfloat16" if model.dtype == "float32" else model.dtype
    least = replace(model, checkpointing=True, quantization=model.quantization or "nf4", dtype=half)
    if len(found) > 1:
        found.append(Change("all of these", least.needed(shape_of(1))))
    return found


@contextmanager
def answered_shortage(
    geometry: Geometry, train: Sequence[EncodedConversation], settings: Parameters, batch_size: int
) -> Iterator[None]:
    """Convert an out-of-memory error of a training into a message with its figures and the settings that need less.

    Args:
        batch_size: captions of one forward pass.

    Raises:
        MachineError: if memory ran out. Other errors pass unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"{machine_fault(error)} {_figures(geometry, train, settings, batch_size)}") from error


def _figures(geometry: Geometry, train: Sequence[EncodedConversation], settings: Parameters, batch_size: int) -> str:
    model = MemoryModel.of(geometry, settings, mask_bytes=4 if settings.device == "cpu" else 1)
    per_step = settings.training_args.captions_per_step
    shape_of = partial(largest_pass, train, settings.rows, per_step)
    now = shape_of(batch_size)
    lighter = "; ".join(
        f"{change.setting}: {shown_bytes(change.bytes)}" for change in changes(model, shape_of, batch_size, per_step)
    )
    return (
        f"The largest forward pass of this training holds {batch_size} captions, {now.tokens} tokens, for which a GPU "
        f"needs about {shown_bytes(model.needed(now))} in all, {shown_bytes(model.weights)} of them for the base. "
        f"By the same estimate: {lighter}. `qwen-vl-lora plan` shows more."
    )


def _reached(layers: Iterable[str], targets: Sequence[str] | str) -> list[str]:
    """The layers that a list of LoRA targets matches by suffix, as PEFT does; all layers for a pattern."""
    if isinstance(targets, str):
        return list(layers)
    return [layer for layer in layers if any(f".{layer}".endswith(f".{t}") or t.endswith(f".{layer}") for t in targets)]
