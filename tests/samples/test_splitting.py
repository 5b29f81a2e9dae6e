from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.conversations import image_marker
from qwen_vl_lora.samples.image_files import LOOK_BYTES
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.splitting import choose_sides, connect, split_conversations, summarize


def split_of(
    test_images: int | float | str = 4, validation_images: int | float | str = 0, seed: int = 42
) -> SplitParameters:
    return SplitParameters(test_images=test_images, validation_images=validation_images, seed=seed)


def store(shas: list[str], looks: np.ndarray | None = None) -> ImageStore:
    entries = [ImageEntry(f"id {sha}", sha, "data/files", ".jpg", 40, 30, 100) for sha in shas]
    if looks is None:  # no two alike
        looks = np.random.default_rng(0).integers(0, 2**63, (len(shas), LOOK_BYTES // 8), dtype=np.uint64)
    return ImageStore(None, entries, looks)


def conversation(number: int, *shas: str) -> dict:
    text = " ".join(["Look:", *(image_marker(f"data/files/{sha}.jpg") for sha in shas)])
    messages = [{"from": "user", "value": text}, {"from": "assistant", "value": f"Answer {number}."}]
    return {"id": f"identity_{number}", "conversations": messages}


def shas_of(records: list[dict]) -> set[str]:
    texts = [message["value"] for record in records for message in record["conversations"]]
    return {piece.split(".jpg")[0] for text in texts for piece in text.split("data/files/")[1:]}


FIVE_HUNDRED = [f"{number:03x}" for number in range(500)]


def test_the_recipe_keeps_496_of_500_rows_to_train_on():
    records = [conversation(number, sha) for number, sha in enumerate(FIVE_HUNDRED)]
    split = split_conversations(records, store(FIVE_HUNDRED), split_of(test_images=4))
    assert (len(split.train), len(split.validation), len(split.test)) == (496, 0, 4)
    assert split.summary["images"] == split.summary["samples"] == {"train": 496, "validation": 0, "test": 4}
    assert split.summary["overlap"] == {"train_validation": 0, "train_test": 0, "validation_test": 0}
    assert split.summary["seed"] == 42


def test_all_captions_of_an_image_stay_on_one_side():
    shas = FIVE_HUNDRED[:20]
    records = [conversation(number, sha) for number, sha in enumerate(shas * 5)]
    split = split_conversations(records, store(shas), split_of(test_images=3, validation_images=2))
    assert (len(split.train), len(split.validation), len(split.test)) == (75, 10, 15)
    assert not shas_of(split.train) & shas_of(split.test)
    assert not shas_of(split.train) & shas_of(split.validation)


def test_conversations_that_share_an_image_stay_together():
    shas = FIVE_HUNDRED[:30]
    chain = [conversation(0, shas[0], shas[1]), conversation(1, shas[1], shas[2])]
    records = chain + [conversation(number, sha) for number, sha in enumerate(shas[2:], start=2)]
    for seed in range(20):
        split = split_conversations(records, store(shas), split_of(test_images=5, seed=seed))
        sides = [side for side in (split.train, split.test) if set(shas[:3]) & shas_of(side)]
        assert len(sides) == 1
        assert len(shas_of(split.test)) == 5


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    records = [conversation(number, sha) for number, sha in enumerate(FIVE_HUNDRED[:50] * 2)]
    shuffled = random.Random(0).sample(records, len(records))
    one = split_conversations(records, store(FIVE_HUNDRED[:50]), split_of(5, 5))
    other = split_conversations(shuffled, store(FIVE_HUNDRED[:50]), split_of(5, 5))
    assert shas_of(one.test) == shas_of(other.test)
    assert shas_of(one.validation) == shas_of(other.validation)


def test_another_seed_holds_out_other_images():
    records = [conversation(number, sha) for number, sha in enumerate(FIVE_HUNDRED)]
    sides = [split_conversations(records, store(FIVE_HUNDRED), split_of(seed=seed)) for seed in (1, 2)]
    assert shas_of(sides[0].test) != shas_of(sides[1].test)


def test_text_only_conversations_train():
    shas = FIVE_HUNDRED[:6]
    records = [conversation(99), *(conversation(number, sha) for number, sha in enumerate(shas))]
    split = split_conversations(records, store(shas), split_of(test_images=4))
    assert records[0] in split.train
    assert split.summary["samples"]["train"] == 3


@pytest.mark.parametrize("num_images", [0, 3, 4, 5])
def test_too_few_images_are_an_error_with_both_numbers(num_images):
    shas = FIVE_HUNDRED[:num_images]
    records = [conversation(number, sha) for number, sha in enumerate(shas)]
    with pytest.raises(DataFormatError, match=rf"split\.test_images: 4 .* have {num_images} different pictures"):
        split_conversations(records, store(shas), split_of(test_images=4, validation_images=1))


def test_a_number_that_groups_cannot_reach_is_an_error():
    pairs = [(f"a{number}", f"b{number}") for number in range(5)]
    with pytest.raises(DataFormatError, match=r"split\.test_images: 3 cannot be reached exactly, only 2"):
        choose_sides(pairs, split_of(test_images=3))


@pytest.mark.parametrize(
    ("num_images", "test", "validation", "expected"),
    [
        (1000, "10% up to 64", "5%", (886, 50, 64)),
        (500, "10% up to 64", "5%", (425, 25, 50)),
        (100, 0.1, 0.05, (85, 5, 10)),
        (100, "2.5%", 3, (95, 3, 2)),
        (2, "10% up to 64", 0, (1, 0, 1)),
        (3, "10% up to 64", "5%", (1, 1, 1)),
        (9, "90%", 0, (1, 0, 8)),
    ],
)
def test_a_share_holds_out_its_part_of_the_pictures_and_one_at_least(num_images, test, validation, expected):
    shas = [f"{number:04x}" for number in range(num_images)]
    records = [conversation(number, sha) for number, sha in enumerate(shas * 2)]
    summary = split_conversations(records, store(shas), split_of(test, validation)).summary
    assert tuple(summary["images"][side] for side in ("train", "validation", "test")) == expected
    assert summary["samples"] == {side: 2 * count for side, count in summary["images"].items()}


def test_the_resolved_split_is_said_in_one_line(caplog):
    shas = FIVE_HUNDRED[:20]
    with caplog.at_level("INFO"):
        split_conversations([conversation(n, sha) for n, sha in enumerate(shas)], store(shas), split_of("10% up to 64"))
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 20 pictures are held out for test, 0 for validation "
        "(split.test_images: 10% up to 64, validation_images: 0)."
    ]


@pytest.mark.parametrize(("num_images", "test", "validation"), [(0, "10%", 0), (1, "10%", 0), (2, "10%", "5%")])
def test_too_few_pictures_for_a_share_are_told_how_to_train_on_all(num_images, test, validation):
    records = [conversation(number, sha) for number, sha in enumerate(FIVE_HUNDRED[:num_images])] or [conversation(0)]
    images = store(FIVE_HUNDRED[:num_images])
    advice = r'kedro run --pipelines data_engineering,training --params "split\.test_images=0[,"]'
    with pytest.raises(DataFormatError, match=advice):
        split_conversations(records, images, split_of(test, validation))
    split = split_conversations(records, images, split_of(0, 0))  # the advice
    assert (split.train, split.validation, split.test) == (records, [], [])


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_share_of_pictures_that_hang_together_takes_what_can_be_reached(size):
    groups = [tuple(f"{group}-{number}" for number in range(size)) for group in range(6)]
    sides = choose_sides(groups, split_of("5%"))
    assert sum(side == "test" for side in sides.values()) == size


def test_a_share_that_would_pass_its_limit_or_leave_nothing_is_an_error_with_advice():
    groups = [("a1", "a2", "a3"), ("b1", "b2", "b3")]
    advice = r"Set split\.test_images to 0 or another number; with .* kedro run --pipelines data_engineering,training\."
    with pytest.raises(DataFormatError, match=advice):
        choose_sides(groups, split_of("10% up to 2"))
    with pytest.raises(DataFormatError, match=r"split\.test_images: 1 cannot be reached exactly, only 0"):
        choose_sides(groups[:1], split_of("10%"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=9),
    st.integers(1, 99),
    st.integers(1, 8) | st.none(),
)
def test_a_share_keeps_its_limit_and_leaves_something_to_train_on_or_is_refused(pictures, percent, limit):
    share = f"{percent}%" if limit is None else f"{percent}% up to {limit}"
    try:
        sides = choose_sides(pictures, split_of(share))
    except DataFormatError:
        return
    counts = [sum(side == wanted for side in sides.values()) for wanted in ("train", "test")]
    assert min(counts) >= 1
    assert limit is None or counts[1] <= limit
    for shas in pictures:
        assert len({sides[sha] for sha in shas}) == 1


def test_an_overlap_stops_the_run():
    with pytest.raises(DataFormatError, match=r"is on two sides of the split: .*'train_test': 1"):
        summarize(["train", "test"], [("aa",), ("aa",)], store(["aa"]), split_of())


def test_pictures_that_look_alike_on_two_sides_are_reported_not_removed():
    shas = FIVE_HUNDRED[:10]
    looks = np.random.default_rng(0).integers(0, 2**63, (10, LOOK_BYTES // 8), dtype=np.uint64)
    records = [conversation(number, sha) for number, sha in enumerate(shas)]
    plain = split_conversations(records, store(shas, looks), split_of(test_images=1))
    assert plain.summary["near_duplicates"] == {"count": 0, "nearest": []}
    (held_out,) = shas_of(plain.test)
    copy = "000" if held_out != "000" else "001"
    looks[shas.index(copy)] = looks[shas.index(held_out)]
    split = split_conversations(records, store(shas, looks), split_of(test_images=1))
    assert split.summary["near_duplicates"] == {
        "count": 1,
        "nearest": [
            {"sides": ["train", "test"], "images": [f"data/files/{sha}.jpg" for sha in (copy, held_out)], "distance": 0}
        ],
    }
    assert len(split.train) == 9


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3), max_size=8))
def test_connected_groups_divide_the_pictures_and_no_conversation_is_torn(pictures):
    groups = connect(pictures)
    members = [sha for group in groups for sha in group]
    assert sorted(members) == sorted({sha for shas in pictures for sha in shas})
    for shas in pictures:
        assert sum(bool(set(shas) & set(group)) for group in groups) == (1 if shas else 0)
