"""Greedy decoding of one batch of prompts: what `generate` writes, without its copies.

Tokens are written into room behind the keys and values of earlier ones, what all prompts begin with is computed once,
and rows that have ended leave. Knows nothing of pictures and texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 64
"""Tokens of room behind keys and values that have filled theirs."""


def keeps_all_tokens(model: Any) -> bool:
    """Whether every layer keeps keys and values of all tokens; linear and windowed attention do not."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class Decoder:
    """Takes the likeliest token each time.

    Args:
        ends: token ids that end an answer.
        most: tokens of an answer.
        penalty: divides the scores of tokens that prompt or answer contain; 1 leaves them.
    """

    def __init__(self, model: Any, ends: Sequence[int], most: int, penalty: float) -> None:
        self._model = model
        self._ends = frozenset(ends)
        self._most = most
        self._penalty = penalty
        self._beginning: tuple[torch.Tensor, Cache] | None = None

    @torch.inference_mode()
    def answers(self, inputs: dict[str, Any], shared: int) -> Iterator[tuple[int, list[int]]]:
        """The number of a row and its token ids, as they end. The last id is an end, unless the answer was cut.

        Args:
            inputs: keyword arguments of the model for rows padded on the left: `input_ids`, `attention_mask` (B, T),
                `position_ids` (3, B, T), pictures.
            shared: tokens that all rows begin with, before any picture; what is padded stands behind them.
        """
        inputs = dict(BatchFeature(inputs).to(self._model.device))
        ids, mask, positions = (inputs.pop(name) for name in ("input_ids", "attention_mask", "position_ids"))
        seen = _Seen(ids, mask, self._penalty)
        cache = self._begin(ids[:1, :shared], positions[:, :1, :shared], len(ids))
        logits = self._logits(ids[:, shared:], mask, positions[:, :, shared:], cache, **inputs)
        position = positions.amax(dim=(0, 2))
        numbers, written = list(range(len(ids))), [list[int]() for _ in ids]
        ended = set[int]()
        while True:
            tokens = seen.likeliest(logits)
            for row, token in enumerate(tokens.tolist()):
                if row in ended:
                    continue
                written[row].append(token)
                if token in self._ends or len(written[row]) == self._most:
                    ended.add(row)
                    yield numbers[row], written[row]
            if len(ended) == len(numbers):
                return
            position = position + 1
            if 4 * len(ended) >= len(numbers):  # leaving copies what stays
                stays = [row for row in range(len(numbers)) if row not in ended]
                numbers, written, ended = [numbers[row] for row in stays], [written[row] for row in stays], set()
                index = torch.tensor(stays, device=mask.device)
                cache.batch_select_indices(index)
                seen.select(index)
                tokens, mask, position = tokens[index], mask[index], position[index]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._logits(tokens[:, None], mask, position[None, :, None].expand(3, -1, 1), cache)

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache, **pictures: Any
    ) -> torch.Tensor:
        """Scores (B, vocabulary) of the token that follows."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **pictures,
        )
        return output.logits[:, -1].float()

    def _begin(self, ids: torch.Tensor, positions: torch.Tensor, rows: int) -> Cache:
        """A cache that contains the shared beginning (1, tokens) in every row; batches that begin alike share it."""
        cache = Cache(layer_class_to_replicate=_RoomyLayer)
        if not ids.shape[1]:
            return cache
        if self._beginning is None or not torch.equal(self._beginning[0], ids):
            alone = Cache(layer_class_to_replicate=_RoomyLayer)
            self._logits(ids, torch.ones_like(ids), positions, alone)
            self._beginning = ids, alone
        for number, layer in enumerate(self._beginning[1].layers):
            cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
        return cache


class _Seen:
    """The tokens that each row contains, whose scores are penalised."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, penalty: float) -> None:
        self._ids = ids.where(mask.bool(), ids[:, -1:])  # padding was not said
        self._penalty = penalty

    def likeliest(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of each row (B,)."""
        if self._penalty == 1:
            return scores.argmax(dim=-1)
        said = scores.gather(1, self._ids)
        said = torch.where(said < 0, said * self._penalty, said / self._penalty)
        tokens = scores.scatter(1, self._ids, said).argmax(dim=-1)
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        return tokens

    def select(self, rows: torch.Tensor) -> None:
        self._ids = self._ids[rows]


class _RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, width) with room behind them: a token is written, and nothing is copied."""

    _memory: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if not self._memory or len(self._memory[0]) != len(self.keys) or after > self._memory[0].shape[-2]:
            self._memory = tuple(
                states.new_empty((*states.shape[:2], after + _ROOM, states.shape[-1]))
                for states in (key_states, value_states)
            )
            for memory, kept in zip(self._memory, (self.keys, self.values), strict=True):
                memory[..., :before, :] = kept
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., before:after, :] = states
        self.keys, self.values = (memory[..., :after, :] for memory in self._memory)
        return self.keys, self.values
