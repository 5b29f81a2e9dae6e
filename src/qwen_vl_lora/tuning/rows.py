"""How conversations share a row, and how the rows of one optimizer step share forward passes.

A row is what one line of a batch holds: a prompt, and the answers to it side by side. Captions of
one picture under one prompt have equal prompts, so picture and prompt are computed once. Each answer
sees the prompt and itself; its positions continue from the prompt as if it stood alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_vl_lora.modeling.chat import EncodedConversation


@dataclass(frozen=True, slots=True)
class Row:
    """Conversations with one and the same prompt, at least one."""

    members: tuple[EncodedConversation, ...]

    @property
    def prompt_length(self) -> int:
        """Tokens that the members have in common."""
        return self.members[0].prompt_length

    @property
    def length(self) -> int:
        """Tokens of the row: the prompt once, then every answer."""
        return self.prompt_length + sum(len(member.ids) - self.prompt_length for member in self.members)


def group_rows(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"], max_tokens: int
) -> list[Row]:
    """Put conversations with equal prompts into one row.

    Args:
        conversations: what one optimizer step trains.
        rows: `separate` gives every conversation its own.
        max_tokens: a shared row longer than this is split between answers.
    """
    if rows == "separate":
        return [Row((conversation,)) for conversation in conversations]
    groups: defaultdict[object, list[EncodedConversation]] = defaultdict(list)
    for position, conversation in enumerate(conversations):
        groups[_prompt_key(conversation, position)].append(conversation)
    return [row for group in groups.values() for row in _split(group, max_tokens)]


def _prompt_key(conversation: EncodedConversation, position: int) -> object:
    prompt_length = conversation.prompt_length
    if conversation.is_image[prompt_length:].any():
        return position  # a picture behind the prompt belongs to one answer alone
    return conversation.images, conversation.ids[:prompt_length].tobytes()


def _split(group: list[EncodedConversation], max_tokens: int) -> Iterator[Row]:
    members: list[EncodedConversation] = []
    length = group[0].prompt_length
    for conversation in group:
        answer = len(conversation.ids) - conversation.prompt_length
        if members and length + answer > max_tokens:
            yield Row(tuple(members))
            members, length = [], conversation.prompt_length
        members.append(conversation)
        length += answer
    yield Row(tuple(members))


def pack_rows(rows: Sequence[Row], max_rows: int, max_tokens: int) -> list[list[Row]]:
    """Cut the rows of a step into forward passes, rows of similar length together.

    Since the loss of a step is one sum over its answer tokens, the cut changes neither loss nor gradients.

    Args:
        rows: the rows of one optimizer step.
        max_rows: rows of one forward pass.
        max_tokens: tokens of one forward pass, padding included; a longer single row goes alone.
    """
    passes: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        current = passes[-1] if passes else []
        fits = len(current) < max_rows and current and (len(current) + 1) * current[0].length <= max_tokens
        if fits:
            current.append(row)
        else:
            passes.append([row])
    return passes


def plan_passes(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"], batch_size: int
) -> list[list[Row]]:
    """The forward passes of one optimizer step; none for a rank whose share of it is empty.

    A pass is as large as `batch_size` separate rows would be: that many tokens, however they are packed.
    """
    if not conversations:
        return []
    max_tokens = batch_size * max(len(conversation.ids) for conversation in conversations)
    return pack_rows(group_rows(conversations, rows, max_tokens), batch_size, max_tokens)


class StepSampler:
    """The conversations of each optimizer step, as lists of indices.

    Works as a DataLoader's `batch_sampler`. The order depends on seed and epoch alone. Conversations
    that can share a row stay together, and are split only where a step is full.

    Args:
        groups: for each conversation the group it can share a row with.
        step_size: captions of one optimizer step over all ranks.
        rank: this process.
        world_size: processes; each takes a share of every step, which may be empty in the last one.
    """

    def __init__(self, groups: Sequence[int], step_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        members: defaultdict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            members[group].append(index)
        self._groups = list(members.values())
        self._group_of = np.asarray(groups)
        self._num_conversations = len(groups)
        self._step_size = step_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._num_conversations // self._step_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            cuts = self._cuts(step)
            yield step[cuts[self._rank] : cuts[self._rank + 1]].tolist()

    def _cuts(self, step: np.ndarray) -> list[int]:
        """Where a step is cut into the ranks' shares.

        Between two groups if that is near an even cut: what can share a row then does so within one rank.
        """
        even = len(step) / self._world_size
        groups = self._group_of[step]
        borders = np.array([0, *(np.flatnonzero(np.diff(groups)) + 1), len(step)])
        cuts = []
        for rank in range(self._world_size + 1):
            nearest = int(borders[np.abs(borders - rank * even).argmin()])
            cuts.append(nearest if abs(nearest - rank * even) < even / 2 else round(rank * even))
        return cuts

    def steps(self) -> list[np.ndarray]:
        """Indices of every step of the epoch, over all ranks."""
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._groups))
        indices = np.array([index for group in order for index in self._groups[group]], dtype=np.int64)
        return [indices[start : start + self._step_size] for start in range(0, len(indices), self._step_size)]


def share_groups(conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"]) -> list[int]:
    """For each conversation the number of its group: those of one group can share a row."""
    if rows == "separate":
        return list(range(len(conversations)))
    numbers: dict[object, int] = {}
    return [
        numbers.setdefault(_prompt_key(conversation, position), len(numbers))
        for position, conversation in enumerate(conversations)
    ]
