"""Splits conversations into training and held-out sides by the bytes of their pictures.

Conversations that share a picture, directly or through others, stay on one side, whatever their
ids. The side depends only on the seed and the pictures, not on the order of the rows.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import HeldOut, SplitParameters
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.looks import find_near_duplicates
from qwen_vl_lora.samples.record_files import Records

logger = logging.getLogger(__name__)

Side = Literal["train", "validation", "test"]
SIDES: tuple[Side, ...] = ("train", "validation", "test")
MAX_REPORTED_PAIRS = 50
WITHOUT_EVALUATION = "kedro run --pipelines data_engineering,training"

Record = dict[str, Any]


class Split(NamedTuple):
    """The outputs of a split, in the order in which the pipeline names them."""

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    summary: dict[str, Any]


def split_conversations(conversations: Sequence[Record], images: ImageStore, split: SplitParameters) -> Split:
    """Hold out `test_images` and `validation_images` pictures with all their conversations.

    Conversations without a picture train, and with `test_images: 0` all of them do. If conversations carry the
    split of their file (`captions.split_column`), that split is used.

    Raises:
        DataFormatError: when there are too few pictures, or a picture would be on two sides.
    """
    known: dict[tuple[str, ...], tuple[str, ...]] = {}  # conversations of equal pictures share one tuple
    pictures: list[tuple[str, ...]] = []
    given: list[Side | None] = []
    has_split = False
    for record in conversations:
        shas = tuple(images.by_path(path).sha256 for path in parse_conversation(record).image_paths)
        pictures.append(known.setdefault(shas, shas))
        given.append(record.get("split"))
        has_split = has_split or "split" in record
    sides = deal(pictures, given, split)
    parts = {side: _choose(conversations, sides, side) for side in SIDES}
    summary = summarize(sides, pictures, images, split)
    summary["origin"] = "file" if has_split else "drawn"
    held_out = summary["images"]
    origin = summary["origin"]
    logger.info(
        "%d of %d pictures are held out for test, %d for validation (%s).",
        held_out["test"],
        sum(held_out.values()),
        held_out["validation"],
        f"split.test_images: {split.test_images}, validation_images: {split.validation_images}"
        if origin == "drawn"
        else "by the file's own split",
    )
    return Split(**parts, summary=summary)


def _choose(conversations: Sequence[Record], sides: Sequence[Side], side: Side) -> Sequence[Record]:
    import numpy as np

    places = np.flatnonzero(np.fromiter((own == side for own in sides), bool, len(sides)))
    if isinstance(conversations, Records):
        return conversations.choose(places)
    return [conversations[place] for place in places.tolist()]


def deal(pictures: Sequence[Sequence[str]], given: Sequence[Side | None], split: SplitParameters) -> list[Side]:
    """Return the side of each conversation: the file's own split if it has one, else a drawn one.

    Args:
        pictures: sha256 of the pictures of each conversation.
        given: the file's split of each conversation.

    Raises:
        DataFormatError: when the split needs too many pictures, or the file has one picture on two sides.
    """
    if not any(given):
        by_picture = choose_sides(pictures, split)
        return [by_picture[shas[0]] if shas else "train" for shas in pictures]
    sides: list[Side] = [side or "train" for side in given]
    seen: dict[str, Side] = {}
    torn = [
        sha256
        for shas, side in zip(pictures, sides, strict=True)
        for sha256 in shas
        if seen.setdefault(sha256, side) != side
    ]
    if torn:
        raise DataFormatError(
            f"captions.split_column: {len(set(torn))} pictures are on two sides of the file's own split, so the test "
            f"would measure what was trained; the first has the sha256 {torn[0]}. Give all rows of a picture the same "
            "split, or set captions.split_column: null to draw the split by picture."
        )
    return sides


def choose_sides(pictures: Iterable[Sequence[str]], split: SplitParameters) -> dict[str, Side]:
    """Return the side of every picture (sha256), given the pictures of each conversation.

    Raises:
        DataFormatError: when the split needs more pictures than there are.
    """
    groups = connect(pictures)
    num_images = sum(len(group) for group in groups)
    wanted = split.held_out("test").of(num_images) + split.held_out("validation").of(num_images)
    if wanted and num_images <= wanted:
        raise DataFormatError(
            f"split.test_images: {split.test_images} and split.validation_images: {split.validation_images} "
            f"leave nothing to train on: they hold out {wanted}, and the conversations have {num_images} different "
            "pictures (by their bytes). Lower both, use more rows (captions.num_rows), or train on all without "
            f"evaluation: {_train_on_all(split)}"
        )
    groups.sort(key=lambda group: hashlib.sha256(f"{split.seed}/{group[0]}".encode()).digest())
    sides: dict[str, Side] = {}
    groups = _hold_out(groups, "test", split.held_out("test"), num_images, sides)
    groups = _hold_out(groups, "validation", split.held_out("validation"), num_images, sides)
    sides.update((sha256, "train") for group in groups for sha256 in group)
    return sides


def _train_on_all(split: SplitParameters) -> str:
    settings = ["split.test_images=0"]
    if split.validation_images != 0:
        settings += ["split.validation_images=0", "training_args.eval_strategy='no'"]
        settings += ["training_args.load_best_model_at_end=false"]
    return f'{WITHOUT_EVALUATION} --params "{",".join(settings)}".'


def connect(pictures: Iterable[Sequence[str]]) -> list[list[str]]:
    """Group pictures that occur in one conversation, or are linked through others; each group is sorted."""
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
    """Count the sides of the split from the assigned conversations.

    Raises:
        DataFormatError: when a picture is on two sides.
    """
    shas_by_side: dict[Side, set[str]] = {side: set() for side in SIDES}
    for side, shas in zip(sides, pictures, strict=True):
        shas_by_side[side].update(shas)
    overlap = {f"{one}_{other}": len(shas_by_side[one] & shas_by_side[other]) for one, other in combinations(SIDES, 2)}
    if any(overlap.values()):
        raise DataFormatError(f"The same picture is on two sides of the split: {overlap}. Please report this as a bug.")
    samples = Counter(sides)
    return {
        "seed": split.seed,
        "images": {side: len(shas_by_side[side]) for side in SIDES},
        "samples": {side: samples[side] for side in SIDES},
        "overlap": overlap,
        "near_duplicates": _describe_near_duplicates(shas_by_side, images),
    }


def _hold_out(
    groups: list[list[str]],
    side: Literal["test", "validation"],
    held_out: HeldOut,
    num_images: int,
    sides: dict[str, Side],
) -> list[list[str]]:
    """Take groups in order until there are enough pictures; groups that are too large are skipped.

    A number must be reached exactly. A share takes what fits, or the smallest group if none fits.
    """
    wanted = missing = held_out.of(num_images)
    left: list[list[str]] = []
    for group in groups:
        if len(group) <= missing:
            missing -= len(group)
            sides.update((sha256, side) for sha256 in group)
        else:
            left.append(group)
    if held_out.number is None and missing == wanted and len(left) > 1:
        smallest = min(left, key=len)
        if held_out.limit is None or len(smallest) <= held_out.limit:
            left.remove(smallest)
            sides.update((sha256, side) for sha256 in smallest)
            return left
    if missing and (held_out.number is not None or missing == wanted):
        raise DataFormatError(
            f"split.{side}_images: {wanted} cannot be reached exactly, only {wanted - missing}: the other pictures are "
            f"in groups of {min(map(len, left), default=0)} and more, connected by conversations that share them. "
            f"Set split.{side}_images to {wanted - missing} or another number; with split.test_images: 0 train without "
            f"evaluation: {WITHOUT_EVALUATION}."
        )
    return left


def _describe_near_duplicates(shas_by_side: Mapping[Side, set[str]], images: ImageStore) -> dict[str, Any]:
    """Report pictures on different sides that look alike but have different bytes, for the user to judge."""
    places = {entry.sha256: place for place, entry in enumerate(images)}
    count, nearest = 0, []
    for one, other in combinations(SIDES, 2):
        pairs = find_near_duplicates(shas_by_side[one], shas_by_side[other], places, images.looks)
        count += len(pairs)
        least = heapq.nsmallest(MAX_REPORTED_PAIRS, pairs, key=lambda pair: (pair.distance, pair.one, pair.other))
        nearest += [
            {
                "sides": [one, other],
                "images": [images.by_sha256(sha256).path for sha256 in (pair.one, pair.other)],
                "distance": pair.distance,
            }
            for pair in least
        ]
    nearest.sort(key=lambda pair: (pair["distance"], pair["images"]))
    return {"count": count, "nearest": nearest[:MAX_REPORTED_PAIRS]}
