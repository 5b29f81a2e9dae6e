"""How conversations share a row, and how the rows of one optimizer step share forward passes.

A row is one line of a batch: a prompt followed by its answers. Captions of one picture under one prompt have equal
prompts, so picture and prompt are computed once. Each answer attends to the prompt and itself; its positions continue
from the prompt as if it were the only answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.training.tokenised import TokenisedSamples


@dataclass(frozen=True, slots=True)
class Row:
    """One or more conversations with the same prompt."""

    members: tuple[EncodedConversation, ...]

    @property
    def prompt_length(self) -> int:
        """Tokens of the shared prompt."""
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
        conversations: those of one optimizer step.
        rows: `separate` gives every conversation its own.
        max_tokens: a shared row longer than this is split between answers.
    """
    if rows == "separate":
        return [Row((conversation,)) for conversation in conversations]
    groups: defaultdict[object, list[EncodedConversation]] = defaultdict(list)
    for position, conversation in enumerate(conversations):
        prompt = conversation.shared_prompt
        groups[position if prompt is None else prompt].append(conversation)
    return [row for group in groups.values() for row in _split(group, max_tokens)]


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
    """Divide the rows of a step into as few forward passes as possible, and among these ways with the least padding.

    The loss of a step is one sum over its answer tokens, so the division changes neither loss nor gradients.

    Args:
        rows: the rows of one optimizer step.
        max_rows: rows of one forward pass.
        max_tokens: tokens of one forward pass, padding included; a longer row gets a pass of its own.
    """
    rows = sorted(rows, key=lambda row: row.length, reverse=True)
    # For the longest rows up to each: passes, tokens, and where the last pass begins. Its first row is its longest.
    best = [(0, 0, 0)]
    for end in range(1, len(rows) + 1):
        ways = []
        for start in range(max(0, end - max_rows), end):
            tokens = (end - start) * rows[start].length
            if tokens <= max_tokens or end - start == 1:
                ways.append((best[start][0] + 1, best[start][1] + tokens, start))
        best.append(min(ways))
    passes: list[list[Row]] = []
    end = len(rows)
    while end:
        passes.insert(0, list(rows[best[end][2] : end]))
        end = best[end][2]
    return passes


def plan_passes(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"], batch_size: int
) -> list[list[Row]]:
    """The forward passes of one optimizer step; none for a rank with an empty share.

    A pass has at most the tokens that `batch_size` separate rows would have, however they are packed.
    """
    if not conversations:
        return []
    max_tokens = most_tokens(conversations, batch_size)
    return pack_rows(group_rows(conversations, rows, max_tokens), batch_size, max_tokens)


def most_tokens(conversations: Sequence[EncodedConversation], batch_size: int) -> int:
    """Tokens that a forward pass of these conversations has at most."""
    return batch_size * max(len(conversation.ids) for conversation in conversations)


def fullest_pass(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"], batch_size: int
) -> list[Row]:
    """Rows of these conversations that fill a forward pass: none of `plan_passes` has more tokens."""
    max_tokens = most_tokens(conversations, batch_size)
    grouped = sorted(group_rows(conversations, rows, max_tokens), key=lambda row: row.length, reverse=True)
    counts = [max(1, min(batch_size, max_tokens // row.length)) for row in grouped]
    passes = [grouped[start : start + count] for start, count in enumerate(counts)]
    return max(passes, key=lambda rows: len(rows) * rows[0].length)


class StepSampler:
    """The conversations of each optimizer step, as lists of indices.

    Works as a DataLoader's `batch_sampler`. The order depends only on seed and epoch. Conversations
    that can share a row stay together, and are split only when a step is full.

    Args:
        groups: for each conversation the number of the group that it can share a row with.
        step_size: captions of one optimizer step over all ranks.
        rank: of this process.
        world_size: processes; each takes a share of every step, which may be empty in the last step.
    """

    def __init__(self, groups: npt.ArrayLike, step_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        _, first, own, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)  # groups are numbered in the order in which they occur
        self._group_of = np.argsort(order)[own]
        self._sizes = sizes[order]
        self._members = np.argsort(self._group_of, kind="stable")
        self._step_size = step_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch, self._first = 0, 0

    def start_at(self, epoch: int, step: int) -> None:
        """Start the next iteration at `step` of an epoch."""
        self._epoch, self._first = epoch, step

    def __len__(self) -> int:
        return -(-len(self._members) // self._step_size)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps()[self._first :]:
            cuts = self._cuts(step)
            yield step[cuts[self._rank] : cuts[self._rank + 1]].tolist()

    def _cuts(self, step: np.ndarray) -> list[int]:
        """The positions that divide a step into the ranks' shares.

        They are between two groups if that is near an even division, so that a group stays on one rank.
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
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._sizes))
        starts, sizes = (np.cumsum(self._sizes) - self._sizes)[order], self._sizes[order]
        # Each group's members stand together in `_members`: from its start there, counted up from its start here.
        places = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(self._members))
        indices = self._members[places]
        return [indices[start : start + self._step_size] for start in range(0, len(indices), self._step_size)]


def share_groups(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"]
) -> npt.NDArray[np.integer]:
    """For each conversation the number of its group: those of one group can share a row."""
    if rows == "separate":
        return np.arange(len(conversations))
    if isinstance(conversations, TokenisedSamples):
        return conversations.groups
    numbers: dict[object, int] = {}
    prompts = (conversation.shared_prompt for conversation in conversations)
    return np.array(
        [numbers.setdefault(place if prompt is None else prompt, len(numbers)) for place, prompt in enumerate(prompts)]
    )


def longest(conversations: Sequence[EncodedConversation], count: int) -> list[EncodedConversation]:
    """The conversations with the most tokens, longest first, read from disk only as far as they are returned."""
    if isinstance(conversations, TokenisedSamples):
        lengths = conversations.lengths
    else:
        lengths = np.array([len(conversation.ids) for conversation in conversations], dtype=np.int32)
    return [conversations[place] for place in np.argsort(-lengths, kind="stable")[:count].tolist()]


def check_rows(
    conversations: Sequence[EncodedConversation], rows: Literal["shared", "separate"], family: Family
) -> None:
    """Refuse shared rows for a family with layers that ignore the mask between answers.

    Raises:
        ParameterError: if two conversations would share a row.
    """
    if not family.shares_rows and len(np.unique(share_groups(conversations, rows))) < len(conversations):
        raise shared_rows_error(family)


def shared_rows_error(family: Family) -> ParameterError:
    return ParameterError(
        f"rows: `shared` puts the answers to one picture into one row, but {family.name} has layers that ignore "
        "the attention mask, so each answer would depend on those before it. Set rows: separate."
    )
