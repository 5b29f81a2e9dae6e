from __future__ import annotations

import numpy as np

from qwen_vl_lora.samples.image_files import LOOK_BYTES
from qwen_vl_lora.samples.looks import MAX_DISTANCE, NearDuplicate, find_near_duplicates, stack_looks


def look(*bits: int) -> bytes:
    cells = np.zeros(8 * LOOK_BYTES, dtype=bool)
    cells[list(bits)] = True
    return np.packbits(cells).tobytes()


LOOKS = {
    "plain": look(),
    "near": look(*range(MAX_DISTANCE)),
    "far": look(*range(100, 100 + MAX_DISTANCE + 1)),
    "same": look(),
}
PLACES = {sha: place for place, sha in enumerate(LOOKS)}


def test_pairs_within_the_distance_are_found_and_others_not():
    found = find_near_duplicates(["plain"], ["near", "far", "same"], PLACES, stack_looks(LOOKS))
    assert found == [NearDuplicate("plain", "near", MAX_DISTANCE), NearDuplicate("plain", "same", 0)]


def test_the_order_of_the_sets_only_turns_the_pairs():
    there = find_near_duplicates(["plain", "far", "same"], ["near"], PLACES, stack_looks(LOOKS))
    assert there == [NearDuplicate("plain", "near", MAX_DISTANCE), NearDuplicate("same", "near", MAX_DISTANCE)]


def test_an_empty_side_has_no_pairs():
    assert find_near_duplicates([], ["near"], PLACES, stack_looks(LOOKS)) == []
    assert stack_looks({}).shape == (0, LOOK_BYTES // 8)
