"""Which tokens of a pass attend to which.

Each token belongs to a row, and in it to the prompt or to one answer. It attends to the earlier tokens of its row that
belong to the prompt or to its own answer. SDPA takes that as a dense mask; FlexAttention skips the blocks in which no
token attends to another, so that rows of different pictures can stand behind one another without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen_vl_lora.exceptions import DeviceError, ParameterError
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.model.flex_attention import FLEX
from qwen_vl_lora.training.rows import Row


@dataclass(frozen=True)
class RowMask:
    """The mask of `L` lines of `T` tokens.

    Attributes:
        row_of: (L, T) int64; the row of each token, -1 for padding.
        answer_of: (L, T) int64; its answer, counted from 1, or 0 for the prompt.
    """

    row_of: torch.Tensor
    answer_of: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], starts: Sequence[tuple[int, int]], shape: tuple[int, int]) -> RowMask:
        """The mask of rows that begin at (line, column) of a pass."""
        row_of, answer_of = np.full(shape, -1, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for number, (row, (line, start)) in enumerate(zip(rows, starts, strict=True)):
            row_of[line, start : start + row.length] = number
            lengths = [len(member.ids) - row.prompt_length for member in row.members]
            answers = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            answer_of[line, start + row.prompt_length : start + row.length] = answers
        return cls(torch.from_numpy(row_of), torch.from_numpy(answer_of))

    def dense(self) -> torch.Tensor:
        """(L, 1, T, T) bool."""
        places = torch.arange(self.row_of.shape[1])
        queries = places[:, None], self.row_of[:, :, None], self.answer_of[:, :, None]
        keys = places[None, :], self.row_of[:, None, :], self.answer_of[:, None, :]
        return _attends(queries, keys)[:, None]

    def blocks(self, device: torch.device) -> Any:
        """FlexAttention's block mask, (L, 1, T, T)."""
        from torch.nn.attention.flex_attention import create_block_mask

        row_of, answer_of = self.row_of.to(device), self.answer_of.to(device)

        def attends(line: Any, _head: Any, query: Any, key: Any) -> Any:
            queries = query, row_of[line, query], answer_of[line, query]
            return _attends(queries, (key, row_of[line, key], answer_of[line, key]))

        lines, width = row_of.shape
        return create_block_mask(attends, lines, None, width, width, device=device)


def _attends(query: tuple[Any, Any, Any], key: tuple[Any, Any, Any]) -> Any:
    """Whether a token attends to another; of each its place, its row and its answer."""
    (place, row, answer), (other_place, other_row, other_answer) = query, key
    return (place >= other_place) & (row == other_row) & ((other_answer == 0) | (other_answer == answer))


def check_packing(attention: str, device: torch.device, family: Family | None) -> None:
    """Refuse FlexAttention where it cannot train.

    Raises:
        DeviceError: on a CPU.
        ParameterError: for a family with layers that ignore the mask.
    """
    if attention != FLEX:
        return
    if device.type == "cpu":
        raise DeviceError(
            "attention: flex_attention is asked for, but torch computes its gradients on GPUs only, and the device is "
            "a CPU. Set attention: sdpa."
        )
    if family is not None and not family.shares_rows:
        raise ParameterError(
            f"attention: `flex_attention` puts the rows of a pass behind one another, but {family.name} has layers "
            "that ignore the attention mask, so each row would depend on those before it. Set attention: sdpa."
        )
