"""The default source: distinct pictures of one partition, captions that are right."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from qwen_vl_lora.samples.records import SourceSample
from qwen_vl_lora.tiny.language import read_attributes
from qwen_vl_lora.tiny.source import draw_captioned_scenes

NUM_IMAGES = 600


@pytest.fixture(scope="module")
def samples() -> list[SourceSample]:
    return list(draw_captioned_scenes(NUM_IMAGES, seed=0))


def caption(sample: SourceSample) -> str:
    return sample.turns[0].text


def test_rows_count_from_one(samples: list[SourceSample]) -> None:
    assert [sample.row for sample in samples] == list(range(1, len(samples) + 1))


def test_each_sample_is_one_picture_and_one_caption(samples: list[SourceSample]) -> None:
    assert {(len(sample.images), tuple(turn.role for turn in sample.turns)) for sample in samples} == {
        (1, ("assistant",))
    }


def test_ids_name_the_pictures(samples: list[SourceSample]) -> None:
    picture_by_id = {sample.id: sample.images[0] for sample in samples}
    assert list(picture_by_id) == [f"scene_{number:04d}" for number in range(1, NUM_IMAGES + 1)]
    assert all(picture_by_id[sample.id] == sample.images[0] for sample in samples)
    assert len(set(picture_by_id.values())) == NUM_IMAGES


def test_some_pictures_have_two_or_three_captions(samples: list[SourceSample]) -> None:
    num_captions = Counter(Counter(sample.id for sample in samples).values())
    assert set(num_captions) == {1, 2, 3}
    assert 0.2 < (num_captions[2] + num_captions[3]) / NUM_IMAGES < 0.36


def test_no_caption_stands_with_two_pictures(samples: list[SourceSample]) -> None:
    assert len({caption(sample) for sample in samples}) == len(samples)


def test_no_two_pictures_say_the_same(samples: list[SourceSample]) -> None:
    contents = {(sample.id, read_attributes(caption(sample))) for sample in samples}
    assert len(contents) == NUM_IMAGES


def test_pictures_come_one_by_one() -> None:
    assert len(list(islice(draw_captioned_scenes(10**9, seed=0), 3))) == 3


def test_seeds_differ_and_repeat() -> None:
    assert list(draw_captioned_scenes(5, seed=1)) == list(draw_captioned_scenes(5, seed=1))
    assert list(draw_captioned_scenes(5, seed=1)) != list(draw_captioned_scenes(5, seed=2))


def test_source_needs_no_torch() -> None:
    code = "import sys, qwen_vl_lora.tiny.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_default_recipe_draws_the_captions_that_its_published_figures_were_measured_on() -> None:
    """Of 600 pictures with seed 7, as conf/base/catalog.yml has them."""
    digest = hashlib.sha256()
    for sample in draw_captioned_scenes(600, seed=7):
        digest.update(f"{sample.id} {sample.turns[-1].text}\n".encode())
    assert digest.hexdigest() == "25eee36c452f192cbbb6ae0b50de431936aca2ea0293dfefb3d52571de24ad7b"
