"""Packing changes neither what is trained nor how it is weighted."""

import itertools

import numpy as np
import pytest

from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.training.rows import (
    StepSampler,
    fullest_pass,
    group_rows,
    most_tokens,
    pack_rows,
    plan_passes,
    share_groups,
)


def encoded(identity: str, image: str, answer: int, prompt: int = 10) -> EncodedConversation:
    ids = np.arange(prompt + answer)
    is_image = np.zeros(prompt + answer, dtype=bool)
    is_image[2:6] = True
    return EncodedConversation(identity, ids, ids >= prompt, is_image, (image,), ((1, 4, 4),))


def test_captions_of_one_picture_share_a_row():
    rows = group_rows([encoded("a", "x", 3), encoded("b", "y", 4), encoded("c", "x", 5)], "shared", 1000)
    assert [[member.id for member in row.members] for row in rows] == [["a", "c"], ["b"]]
    assert rows[0].length == 10 + 3 + 5


def test_separate_rows_stay_separate():
    assert len(group_rows([encoded("a", "x", 3), encoded("b", "x", 4)], "separate", 1000)) == 2


def test_a_picture_behind_the_prompt_keeps_its_row_to_itself():
    late = encoded("late", "x", 6)
    late.is_image[12] = True
    rows = group_rows([late, encoded("b", "x", 6)], "shared", 1000)
    assert [len(row.members) for row in rows] == [1, 1]


def test_a_shared_row_is_split_where_it_would_be_too_long():
    rows = group_rows([encoded(str(n), "x", 5) for n in range(5)], "shared", max_tokens=20)
    assert [len(row.members) for row in rows] == [2, 2, 1]


def test_passes_hold_rows_of_similar_length_and_no_more_tokens_than_allowed():
    rows = group_rows([encoded(str(n), str(n), 1 + n) for n in range(9)], "separate", 1000)
    passes = pack_rows(rows, max_rows=4, max_tokens=60)
    assert sorted(row.members[0].id for batch in passes for row in batch) == [str(n) for n in range(9)]
    assert all(len(batch) * max(row.length for row in batch) <= 60 for batch in passes)
    lengths = [row.length for batch in passes for row in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_passes_have_the_least_padding_of_all_ways_with_as_few_of_them():
    lengths = (14, 10, 9, 8, 8, 3, 3, 3, 2)
    rows = group_rows([encoded(str(n), str(n), length) for n, length in enumerate(lengths)], "separate", 1000)
    sizes = [row.length for row in rows]

    def ways(rest):
        """Every division of rows in this order into passes that are allowed."""
        if not rest:
            yield []
        for count in range(1, min(4, len(rest)) + 1):
            if count * rest[0] <= 60 or count == 1:
                yield from ([rest[:count], *others] for others in ways(rest[count:]))

    least = min((len(way), sum(len(part) * part[0] for part in way)) for way in ways(sizes))
    passes = pack_rows(rows, max_rows=4, max_tokens=60)
    assert (len(passes), sum(len(batch) * batch[0].length for batch in passes)) == least


@pytest.mark.parametrize("rows", ["shared", "separate"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_no_pass_is_larger_than_the_fullest(rows, batch_size):
    step = [encoded(str(n), str(n // 3), 1 + 5 * n % 7) for n in range(16)]
    fullest = fullest_pass(step, rows, batch_size)
    tokens = [len(batch) * batch[0].length for batch in plan_passes(step, rows, batch_size)]
    assert max(tokens) <= len(fullest) * fullest[0].length <= max(most_tokens(step, batch_size), max(tokens))


@pytest.mark.parametrize("rows", ["shared", "separate"])
def test_a_step_trains_each_of_its_captions_once(rows):
    step = [encoded(str(n), str(n // 3), 1 + n % 4) for n in range(16)]
    passes = plan_passes(step, rows, batch_size=4)
    trained = [member.id for batch in passes for row in batch for member in row.members]
    assert sorted(trained) == sorted(item.id for item in step)


@pytest.mark.parametrize("rows", ["shared", "separate"])
def test_every_epoch_holds_every_caption_once_in_steps_of_the_plain_size(rows):
    conversations = [encoded(str(n), str(n // 5), 3) for n in range(103)]
    sampler = StepSampler(share_groups(conversations, rows), step_size=16, seed=1)
    steps = list(sampler)
    assert [len(step) for step in steps] == [16] * 6 + [7]
    assert sorted(index for step in steps for index in step) == list(range(103))


def test_captions_of_one_picture_are_split_only_at_the_end_of_a_step():
    conversations = [encoded(str(n), str(n // 5), 3) for n in range(100)]
    steps = list(StepSampler(share_groups(conversations, "shared"), step_size=16, seed=3))
    split = [{i // 5 for i in one} & {i // 5 for i in other} for one, other in itertools.pairwise(steps)]
    assert sum(len(pictures) for pictures in split) <= len(steps) - 1


def test_the_order_depends_on_seed_and_epoch_alone():
    groups = list(range(50))
    first, again, other = StepSampler(groups, 8, seed=1), StepSampler(groups, 8, seed=1), StepSampler(groups, 8, seed=2)
    assert list(first) == list(again) != list(other)
    again.start_at(1, 0)
    assert list(first) != list(again)
    again.start_at(0, 3)
    assert list(again) == list(first)[3:]


def test_ranks_share_every_step_without_overlap():
    groups = list(range(50))
    whole = list(StepSampler(groups, 8, seed=1))
    shares = [list(StepSampler(groups, 8, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == whole


def test_what_can_share_a_row_goes_to_one_rank_where_shares_stay_even():
    groups = [0, 0, 0, 0, 0, 1, 1, 1]
    shares = [next(iter(StepSampler(groups, 8, seed=1, rank=rank, world_size=2))) for rank in range(2)]
    assert all(len({groups[index] for index in share}) == 1 for share in shares)
    assert sorted(len(share) for share in shares) == [3, 5]
    one_picture = [next(iter(StepSampler([0] * 8, 8, seed=1, rank=rank, world_size=2))) for rank in range(2)]
    assert [len(share) for share in one_picture] == [4, 4]


def test_more_ranks_than_captions_leave_some_without():
    shares = [next(iter(StepSampler([0, 1], 8, seed=1, rank=rank, world_size=4))) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == [0, 1]
    assert [] in shares


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_drawn_in_the_order_in_which_they_occur(seed):
    groups = np.random.default_rng(seed).integers(0, 7, size=23)
    members = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups.tolist())]
    order = np.random.default_rng([seed, 0]).permutation(len(members))
    drawn = np.concatenate([members[group] for group in order])
    assert np.concatenate(StepSampler(groups, 4, seed).steps()).tolist() == drawn.tolist()
