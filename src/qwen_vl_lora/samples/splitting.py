"""The split: which conversations train and which are held out, by the bytes of their images.

Conversations that share a picture, directly or through others, stay on one side, whatever their
ids. The side follows from the seed and the pictures alone, not from the order of the rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.conversations import Conversation, parse_conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.looks import find_near_duplicates

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
MAX_REPORTED_PAIRS = 50

Record = dict[str, Any]


class Split(NamedTuple):
    """The outputs of a split, in the order in which the pipeline names them."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    summary: dict[str, Any]


def split_conversations(conversations: Sequence[Record], images: ImageStore, split: SplitParameters) -> Split:
    """Hold out `test_images` and `validation_images` pictures with all their conversations.

    Conversations without a picture train.

    Raises:
        DataFormatError: when there are too few pictures, or a picture would stand on two sides.
    """
    pictures = [_pictures(parse_conversation(record), images) for record in conversations]
    side_by_picture = choose_sides(pictures, split)
    sides: list[Side] = [side_by_picture[shas[0]] if shas else "train" for shas in pictures]
    parts = {side: [record for record, own in zip(conversations, sides, strict=True) if own == side] for side in SIDES}
    return Split(**parts, summary=summarize(sides, pictures, images, split))


def choose_sides(pictures: Iterable[Sequence[str]], split: SplitParameters) -> dict[str, Side]:
    """The side of every picture (sha256), given those of each conversation.

    Raises:
        DataFormatError: when the split asks for more pictures than there are.
    """
    groups = connect(pictures)
    num_images = sum(len(group) for group in groups)
    if num_images <= split.test_images + split.validation_images:
        raise DataFormatError(
            f"split.test_images: {split.test_images} and split.validation_images: {split.validation_images} "
            f"leave nothing to train on: the conversations hold {num_images} different images (by their bytes). "
            "Lower the two numbers or take more rows (captions.num_rows)."
        )
    groups.sort(key=lambda group: hashlib.sha256(f"{split.seed}/{group[0]}".encode()).digest())
    sides: dict[str, Side] = {}
    groups = _hold_out(groups, "test", split.test_images, sides)
    groups = _hold_out(groups, "validation", split.validation_images, sides)
    sides.update((sha256, "train") for group in groups for sha256 in group)
    return sides


def connect(pictures: Iterable[Sequence[str]]) -> list[list[str]]:
    """Group pictures that occur in one conversation, or are linked through others; each group sorted."""
    parents: dict[str, str] = {}

    def root(sha256: str) -> str:
        while parents[sha256] != sha256:
            parents[sha256] = sha256 = parents[parents[sha256]]
        return sha256

    for shas in pictures:
        for sha256 in shas:
            parents.setdefault(sha256, sha256)
            parents[root(sha256)] = root(shas[0])
    groups: dict[str, list[str]] = {}
    for sha256 in parents:
        groups.setdefault(root(sha256), []).append(sha256)
    return [sorted(group) for group in groups.values()]


def summarize(
    sides: Sequence[Side], pictures: Sequence[Sequence[str]], images: ImageStore, split: SplitParameters
) -> dict[str, Any]:
    """Count both sides of every split from the conversations as they were dealt out.

    Raises:
        DataFormatError: when a picture stands on two sides.
    """
    shas_by_side: dict[Side, set[str]] = {side: set() for side in SIDES}
    for side, shas in zip(sides, pictures, strict=True):
        shas_by_side[side].update(shas)
    overlap = {f"{one}_{other}": len(shas_by_side[one] & shas_by_side[other]) for one, other in combinations(SIDES, 2)}
    if any(overlap.values()):
        raise DataFormatError(f"The same image stands on two sides of the split: {overlap}. Please report it.")
    samples = Counter(sides)
    return {
        "seed": split.seed,
        "images": {side: len(shas_by_side[side]) for side in SIDES},
        "samples": {side: samples[side] for side in SIDES},
        "overlap": overlap,
        "near_duplicates": _describe_near_duplicates(shas_by_side, images),
    }


def _pictures(conversation: Conversation, images: ImageStore) -> tuple[str, ...]:
    return tuple(images.by_path(path).sha256 for path in conversation.image_paths)


def _hold_out(groups: list[list[str]], side: Side, wanted: int, sides: dict[str, Side]) -> list[list[str]]:
    """Take groups in their order until `wanted` pictures are reached; one that is too large stays."""
    left: list[list[str]] = []
    missing = wanted
    for group in groups:
        if len(group) <= missing:
            missing -= len(group)
            sides.update((sha256, side) for sha256 in group)
        else:
            left.append(group)
    if missing:
        raise DataFormatError(
            f"split.{side}_images: {wanted} cannot be reached exactly, only {wanted - missing}: the other images hang "
            f"together in groups of {min(map(len, left), default=0)} and more through conversations that share them. "
            f"Set split.{side}_images to {wanted - missing} or another number."
        )
    return left


def _describe_near_duplicates(shas_by_side: Mapping[Side, set[str]], images: ImageStore) -> dict[str, Any]:
    """Pictures with other bytes that look alike across sides: reported, for a person to judge."""
    places = {entry.sha256: place for place, entry in enumerate(images)}
    pairs = [
        {
            "sides": [one, other],
            "images": [images.by_sha256(sha256).path for sha256 in (pair.one, pair.other)],
            "distance": pair.distance,
        }
        for one, other in combinations(SIDES, 2)
        for pair in find_near_duplicates(shas_by_side[one], shas_by_side[other], places, images.looks)
    ]
    pairs.sort(key=lambda pair: (pair["distance"], pair["images"]))
    return {"count": len(pairs), "nearest": pairs[:MAX_REPORTED_PAIRS]}
