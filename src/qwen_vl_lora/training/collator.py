"""From rows to the tensors of one forward pass.

Rows are padded on the right: what follows a token changes nothing for it, in attention and in linear attention, so
rows of one answer need no mask. For FlexAttention all rows of a pass stand in one line without padding. Logits are
computed for the scored positions alone. Pictures come as stored features, or as pixels when the tower is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from qwen_vl_lora.features.inputs import PictureInputs
from qwen_vl_lora.model.chat import ChatEncoder, rope_positions
from qwen_vl_lora.model.flex_attention import FLEX
from qwen_vl_lora.training.row_mask import RowMask
from qwen_vl_lora.training.rows import Row


@dataclass
class ForwardPass:
    """One forward pass of `L` lines of `T` tokens, of which `N` are scored.

    Attributes:
        inputs: keyword arguments of the model for `to_device`; all tensors, or tuples of tensors.
        source: (2, N) int64; line and place in the kept logits that predict each label.
        labels: (N,) int64; the scored tokens.
        sample_ids: conversations in it, for messages.
    """

    inputs: dict[str, Any]
    source: torch.Tensor
    labels: torch.Tensor
    sample_ids: list[str]

    def pin_memory(self) -> ForwardPass:
        """The same pass in pinned memory, as torch's DataLoader asks for it."""
        inputs, source, labels = _with_each((self.inputs, self.source, self.labels), torch.Tensor.pin_memory)
        return ForwardPass(inputs, source, labels, self.sample_ids)


def silenced(forward: ForwardPass) -> ForwardPass:
    """The same pass with nothing scored: its gradients are zero.

    For a rank with fewer passes than another: weights or gradients are exchanged during passes, so all ranks need the
    same number.
    """
    return ForwardPass(forward.inputs, forward.source[:, :0], forward.labels[:0], [])


class RowCollator:
    """Builds forward passes from rows.

    Args:
        encoder: encoded the conversations of the rows.
        pictures: their pictures as the model gets them.
        attention: of the language model.
    """

    def __init__(self, encoder: ChatEncoder, pictures: PictureInputs, attention: str = "sdpa") -> None:
        self._pictures = pictures
        self._packs = attention == FLEX
        self._pad_id = encoder.pad_id
        self._merge_size = encoder.sizer.merge_size

    def __call__(self, rows: Sequence[Row]) -> ForwardPass:
        lengths = [row.length for row in rows]
        if self._packs:
            starts, shape = [(0, int(start)) for start in np.cumsum([0, *lengths[:-1]])], (1, sum(lengths))
        else:
            starts, shape = [(line, 0) for line in range(len(rows))], (len(rows), max(lengths))
        ids = np.full(shape, self._pad_id, dtype=np.int64)
        positions = np.zeros((3, *shape), dtype=np.int64)
        sources, labels = [], []
        for row, (line, start) in zip(rows, starts, strict=True):
            flat = _flatten(row, self._merge_size)
            columns = slice(start, start + row.length)
            ids[line, columns], positions[:, line, columns] = flat.ids, flat.positions
            sources.append(np.stack([np.full_like(flat.sources, line), flat.sources + start]))
            labels.append(flat.ids[flat.scored])
        line_of, column_of = np.concatenate(sources, axis=1)
        kept, place_of = np.unique(column_of, return_inverse=True)
        # Only an answer alone in its row can contain pictures, so the first members have all pictures in reading order.
        pictures = self._pictures([name for row in rows for name in row.members[0].images])
        return ForwardPass(
            inputs={
                "input_ids": torch.from_numpy(ids),
                "position_ids": torch.from_numpy(positions),
                "attention_mask": self._mask(rows, starts, shape),
                "logits_to_keep": torch.from_numpy(kept),
                **pictures,
            },
            source=torch.from_numpy(np.stack([line_of, place_of])),
            labels=torch.from_numpy(np.concatenate(labels)),
            sample_ids=[member.id for row in rows for member in row.members],
        )

    def _mask(
        self, rows: Sequence[Row], starts: Sequence[tuple[int, int]], shape: tuple[int, int]
    ) -> RowMask | torch.Tensor | None:
        """None for plain causal attention."""
        if not self._packs and all(len(row.members) == 1 for row in rows):
            return None
        mask = RowMask.of(rows, starts, shape)
        return mask if self._packs else mask.dense()


@dataclass(frozen=True)
class _FlatRow:
    ids: np.ndarray
    positions: np.ndarray
    scored: np.ndarray
    sources: np.ndarray
    """For each scored token the position whose logits predict it."""


def _flatten(row: Row, merge_size: int) -> _FlatRow:
    prompt = row.prompt_length
    first, *others = row.members
    parts = [slice(0, len(first.ids))] + [slice(prompt, len(member.ids)) for member in others]
    members = [first, *others]
    predicted_by = np.arange(-1, row.length - 1)
    start = prompt
    for member in members:
        predicted_by[start] = prompt - 1  # every answer begins directly after the prompt
        start += len(member.ids) - prompt
    scored = np.concatenate([member.scored[part] for member, part in zip(members, parts, strict=True)])
    positions = [rope_positions(member, merge_size)[:, part] for member, part in zip(members, parts, strict=True)]
    return _FlatRow(
        ids=np.concatenate([member.ids[part] for member, part in zip(members, parts, strict=True)]),
        positions=np.concatenate(positions, axis=1),
        scored=scored,
        sources=predicted_by[scored],
    )


def to_device(value: Any, device: torch.device) -> Any:
    """A nested structure with its tensors on a device, and masks as FlexAttention takes them.

    Pinned tensors are copied to a GPU while it computes.
    """
    return _with_each(value, lambda tensor: tensor.to(device, non_blocking=True), lambda mask: mask.blocks(device))


def _with_each(
    value: Any, change: Callable[[torch.Tensor], torch.Tensor], of_mask: Callable[[RowMask], Any] = lambda mask: mask
) -> Any:
    """A nested structure with each of its tensors and masks changed."""
    from transformers.utils.generic import ModelOutput

    again = partial(_with_each, change=change, of_mask=of_mask)
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, RowMask):
        return of_mask(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: again(part) for name, part in value.items()})
    if isinstance(value, dict):
        return {name: again(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(again, value))
    return value
