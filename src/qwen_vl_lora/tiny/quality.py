"""The quality of a base model on pictures of shapes: right attributes, also with blanked and swapped pictures.

Measured on scenes of the held-out partition by greedy answers to the default prompt.
Imports torch only when a model generates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

from qwen_vl_lora.tiny.dialogue import DESCRIBE_PROMPT
from qwen_vl_lora.tiny.drawing import (
    BACKGROUNDS,
    COLOURS,
    FEWEST_OBJECTS,
    MOST_OBJECTS,
    PICTURE_SIDE,
    SHAPES,
    SIZES,
    Scene,
    draw_picture,
)
from qwen_vl_lora.tiny.language import Attributes, read_attributes, true_attributes
from qwen_vl_lora.tiny.partitions import Partition, draw_distinct_scenes

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

Item = TypeVar("Item")

NUM_SCENES = 256
_BLANK = (128, 128, 128)
_MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class BaseQuality:
    """The measurements; all but the count are shares from 0 to 1.

    Attributes:
        num_scenes: held-out scenes, all with different descriptions.
        attributes_right: of all attributes, see `count_right`.
        descriptions_right: scenes whose every attribute is right.
        attributes_right_blanked: the same with a flat grey picture in place of each.
        chance: the highest share that can be expected without pictures, see `chance_accuracy`.
        pairs_swapped: pairs of scenes whose answers differ and swap when their pictures do.
    """

    num_scenes: int
    attributes_right: float
    descriptions_right: float
    attributes_right_blanked: float
    chance: float
    pairs_swapped: float


def measure_quality(directory: Path, seed: int = 0) -> BaseQuality:
    """Measure the base model stored in `directory`, with the plain Auto classes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(directory)
    scenes = held_out_scenes(NUM_SCENES, seed)
    pictures = [draw_picture(scene) for scene in scenes]
    texts = caption_pictures(model, processor, pictures)
    blanked = caption_pictures(model, processor, [blank_picture()] * NUM_SCENES)
    swapped = caption_pictures(model, processor, swap_pairs(pictures))
    return BaseQuality(
        num_scenes=NUM_SCENES,
        attributes_right=attribute_accuracy(texts, scenes),
        descriptions_right=exact_share(texts, scenes),
        attributes_right_blanked=attribute_accuracy(blanked, scenes),
        chance=chance_accuracy(),
        pairs_swapped=swapped_share(texts, swapped),
    )


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Return scenes with different descriptions, none of which occurs in pre-training or fine-tuning."""
    rng = random.Random(f"held out/{seed}")
    return list(draw_distinct_scenes(Partition.HELD_OUT, rng, count))


def blank_picture() -> Image.Image:
    """Return a flat grey picture of the scenes' size."""
    return Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), _BLANK)


def caption_pictures(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    pictures: Sequence[Image.Image],
    prompt: str = DESCRIBE_PROMPT,
    batch_size: int = 32,
) -> list[str]:
    """Answer the prompt for each picture, greedily."""
    import torch

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    question = processor.apply_chat_template([message], add_generation_prompt=True)
    answers: list[str] = []
    for start in range(0, len(pictures), batch_size):
        batch = list(pictures[start : start + batch_size])
        inputs = processor(text=[question] * len(batch), images=batch, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=_MAX_ANSWER_TOKENS)
        answers += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def count_right(said: Attributes, true: Attributes) -> tuple[int, int]:
    """Return how many attributes are right, and how many there were to get right.

    The background is one attribute; size, colour and shape of each thing are three, compared
    in reading order. A missing and a surplus attribute are both wrong, so neither silence
    nor guessing raises the share.
    """
    right = int(said.background == true.background)
    for said_thing, true_thing in zip(said.things, true.things, strict=False):
        right += said_thing.size == true_thing.size
        right += said_thing.colour == true_thing.colour
        right += said_thing.shape == true_thing.shape
    return right, 1 + 3 * max(len(said.things), len(true.things))


def attribute_accuracy(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Return the share of right attributes over all scenes, in [0, 1]."""
    counts = [
        count_right(read_attributes(text), true_attributes(scene)) for text, scene in zip(texts, scenes, strict=True)
    ]
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def exact_share(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Return the share of scenes whose text names every attribute right, and nothing else."""
    hits = [read_attributes(text) == true_attributes(scene) for text, scene in zip(texts, scenes, strict=True)]
    return sum(hits) / len(hits)


def chance_accuracy() -> float:
    """Return the highest share of right attributes that can be expected without pictures.

    Attributes are drawn uniformly and independently, so no guess at one beats one over the
    number of its values; knowing the number of objects for free, the mean scene has one
    background and 3 objects: (1/4 + 3 (1/2 + 1/8 + 1/6)) / 10 = 0.2625.
    """
    num_objects = Fraction(FEWEST_OBJECTS + MOST_OBJECTS, 2)
    per_thing = Fraction(1, len(SIZES)) + Fraction(1, len(COLOURS)) + Fraction(1, len(SHAPES))
    return float((Fraction(1, len(BACKGROUNDS)) + num_objects * per_thing) / (1 + 3 * num_objects))


def swap_pairs(items: Sequence[Item]) -> list[Item]:
    """Exchange neighbours: 1st and 2nd, 3rd and 4th, and so on; a last odd one stays."""
    swapped = list(items)
    for left in range(0, len(swapped) - 1, 2):
        swapped[left], swapped[left + 1] = swapped[left + 1], swapped[left]
    return swapped


def swapped_share(texts: Sequence[str], texts_of_swapped: Sequence[str]) -> float:
    """Return the share of pairs whose two texts differ and change places when the pictures do."""
    lefts = range(0, len(texts) - 1, 2)
    hits = [
        texts[left] != texts[left + 1]
        and texts_of_swapped[left] == texts[left + 1]
        and texts_of_swapped[left + 1] == texts[left]
        for left in lefts
    ]
    return sum(hits) / len(hits)
