"""What a source would become is what data_engineering makes of it, without a byte written."""

from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.outlook import look_ahead, typical_captions
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    png,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)

CAPTIONS, PROMPT = captions_parameters(), prompt_parameters()
LIMITS = {"resized_height": None, "resized_width": None, "min_pixels": 56 * 56, "max_pixels": 140 * 140}


@pytest.fixture
def rows(tmp_path):
    """Two captions of one file, one of bytes, a lost file, an empty caption and a row that could not be read."""
    write(tmp_path / "a.jpg", jpeg(1, size=(80, 60)))
    return [
        SourceSample(1, "a", (tmp_path / "a.jpg",), (Turn("assistant", "  a  dog "),)),
        SourceSample(2, "a", (tmp_path / "a.jpg",), (Turn("assistant", "two dogs"),)),
        SourceSample(3, "b", (png(2, size=(50, 70)),), (Turn("user", "What? <image>"), Turn("assistant", "a cat"))),
        SourceSample(4, "c", (tmp_path / "lost.jpg",), (Turn("assistant", "nothing"),)),
        SourceSample(5, "d", (tmp_path / "a.jpg",), (Turn("assistant", " "),)),
        Rejection(6, "", "malformed_row", "no JSON"),
    ]


def texts(conversations):
    return [[turn["value"].partition("<|vision_start|>")[0] for turn in c["conversations"]] for c in conversations]


def test_texts_ids_and_numbers_are_those_of_a_collection(rows, tmp_path):
    ahead = look_ahead(rows, CAPTIONS, image_parameters(), PROMPT)
    image = image_parameters(allowed_roots=[str(tmp_path)])
    collected = collect(rows, workspace_folder(tmp_path), CAPTIONS, image, quarantine_parameters())
    built = build_conversations(collected.samples, collected.images, PROMPT)
    assert texts(ahead.conversations) == texts(built)
    assert [c["id"] for c in ahead.conversations] == [c["id"] for c in built]
    assert ahead.rejected == len(collected.rejected_samples) == 3
    assert len(ahead.images) == len(collected.images) == 2


def test_sizes_come_from_headers_where_they_decide(rows):
    ahead = look_ahead(rows, CAPTIONS, image_parameters(**LIMITS), PROMPT)
    assert sorted((entry.width, entry.height) for entry in ahead.images) == [(50, 70), (80, 60)]


def test_a_picture_that_is_none_counts_as_rejected_where_its_size_decides():
    rows = [SourceSample(1, "a", (b"<html>",), (Turn("assistant", "a dog"),))]
    assert look_ahead(rows, CAPTIONS, image_parameters(**LIMITS), PROMPT).rejected == 1


def test_a_source_that_is_elsewhere_is_stood_in_for_by_as_many_rows_as_are_asked():
    asked = captions_parameters(num_rows=7)
    ahead = look_ahead(typical_captions(), asked, image_parameters(**LIMITS), PROMPT)
    assert (len(ahead.conversations), len(ahead.images), ahead.rejected) == (7, 7, 0)
    assert all((entry.width, entry.height) == (140, 140) for entry in ahead.images)
    assert len({sample.id for sample in islice(typical_captions(), 20)}) == 20


@pytest.mark.parametrize("fixed", [True, False])
def test_a_file_that_no_name_or_limit_allows_counts_as_rejected_and_the_others_go_on(tmp_path, monkeypatch, fixed):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # a bomb in small, by Pillow's own judgement
    files = [Path("a\0b.jpg"), write(tmp_path / "bomb.jpg", jpeg(size=(400, 300))), write(tmp_path / "a.jpg", jpeg())]
    rows = [SourceSample(n, str(n), (file,), (Turn("assistant", "a dog"),)) for n, file in enumerate(files)]
    ahead = look_ahead(rows, CAPTIONS, image_parameters(**({} if fixed else LIMITS)), PROMPT)
    assert ahead.rejected == (1 if fixed else 2)  # of one size for all, no header is read
