"""The weights in `data/06_models/tiny_qwen2_vl` look at the picture: the base's three promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

from qwen_vl_lora.tiny.drawing import Scene, draw_picture
from qwen_vl_lora.tiny.quality import (
    attribute_accuracy,
    blank_picture,
    caption_pictures,
    chance_accuracy,
    held_out_scenes,
    swap_pairs,
    swapped_share,
)

SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"

# Other scenes than those of the model card.
SEED = 2


@pytest.fixture(scope="module")
def model() -> Qwen2VLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype="float32").eval()


@pytest.fixture(scope="module")
def processor() -> Qwen2VLProcessor:
    return AutoProcessor.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return held_out_scenes(64, SEED)


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> list[Image.Image]:
    return [draw_picture(scene) for scene in scenes]


@pytest.fixture(scope="module")
def answers(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, pictures: list[Image.Image]
) -> list[str]:
    return caption_pictures(model, processor, pictures)


def test_nine_in_ten_attributes_of_held_out_scenes_are_right(answers: list[str], scenes: list[Scene]) -> None:
    assert attribute_accuracy(answers, scenes) >= 0.9


def test_answers_are_long(answers: list[str]) -> None:
    assert min(len(answer.split()) for answer in answers) >= 20


def test_with_the_picture_blanked_only_chance_is_left(
    model: Qwen2VLForConditionalGeneration, processor: Qwen2VLProcessor, scenes: list[Scene]
) -> None:
    (answer,) = caption_pictures(model, processor, [blank_picture()])
    # 64 scenes have about 640 attributes: three standard deviations of a share of 0.26 are 0.052.
    assert attribute_accuracy([answer] * len(scenes), scenes) <= chance_accuracy() + 0.052


def test_answers_swap_with_the_pictures(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    pictures: list[Image.Image],
    answers: list[str],
) -> None:
    swapped = caption_pictures(model, processor, swap_pairs(pictures))
    assert swapped_share(answers, swapped) == 1.0


def test_shipped_files_are_small_and_safe() -> None:
    files = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert "README.md" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".py"))]
    assert sum(files.values()) < 10_000_000
