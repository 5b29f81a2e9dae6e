"""The last decoder layer and the output layer compute only what the loss reads.

Later layers need the output of every position, as keys and values; nothing follows the last one but the scored
positions. Its queries, output projection and MLP, LoRA's part of them included, skip all others. Keys and values are
computed everywhere. Loss and gradients are the same sums in fewer terms.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen_vl_lora.model.families.family import Family

_BY_POSITION = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Parts of a layer whose output at a position depends on their input at this position alone."""


class LastLayer:
    """Shortens the last layer of a language model, which stays as it is outside `scored_logits`."""

    def __init__(self, base: Any, family: Family) -> None:
        """`base` is the model that the adapter wraps."""
        self._read: tuple[torch.Tensor, torch.Tensor] | None = None
        """Rows and columns of the positions that are read."""
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None
        """The same among the columns of `logits_to_keep`."""
        self._shape = torch.Size()
        parts = dict(family.language_model_of(base).layers[-1].named_modules())
        for name in _BY_POSITION:
            if name in parts:  # a layer of linear attention has no queries of its own
                parts[name].register_forward_pre_hook(self._take)
                parts[name].register_forward_hook(self._put)
        base.get_output_embeddings().register_forward_pre_hook(self._take_kept)

    def scored_logits(self, model: Any, inputs: dict[str, Any], source: torch.Tensor) -> torch.Tensor:
        """Run the model, of which this is the last layer, and return the logits that predict the labels.

        Args:
            inputs, source: those of a `ForwardPass`, on the model's device.

        Returns:
            (N, vocabulary), in the order of `source`.
        """
        some = source if source.numel() else source.new_zeros(2, 1)  # of nothing, some kernels compute nothing at all
        (rows, places), where = torch.unique(some, dim=1, return_inverse=True)
        self._read, self._kept = (rows, inputs["logits_to_keep"][places]), (rows, places)
        try:
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
        finally:
            self._read = self._kept = None
        return logits[where[: source.shape[1]].to(logits.device)]

    def _take(self, _module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """(B, T, width) → (positions that are read, width)."""
        if self._read is None:
            return None
        hidden, *others = inputs
        self._shape = hidden.shape[:2]
        return hidden[self._read], *others

    def _put(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Back to (B, T, width), with zeros where nothing is read."""
        if self._read is None:
            return None
        return output.new_zeros(*self._shape, output.shape[-1]).index_put(self._read, output)

    def _take_kept(self, _module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor | None:
        """(B, kept, width) → (positions that are read, width).

        One product for all rows: in half precision on a CPU, torch copies the output layer's weights for each row of a
        batched one.
        """
        return None if self._kept is None else inputs[0][self._kept]
