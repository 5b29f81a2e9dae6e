"""The finished tiny base: pre-trained, stored as a plain Qwen2-VL, measured, with a model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from qwen_vl_lora.tiny.dialogue import DESCRIBE_PROMPT
from qwen_vl_lora.tiny.drawing import PICTURE_SIDE, draw_picture
from qwen_vl_lora.tiny.pretraining import PretrainingRecipe, pretrain
from qwen_vl_lora.tiny.quality import caption_pictures, held_out_scenes, measure_quality

_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# Tiny Qwen2-VL

A true `Qwen2VLForConditionalGeneration` with {parameters:,} parameters that describes drawn scenes of
shapes. It is the embedded base model of this project: small enough to ship with the code and to fine-tune
on a laptop's CPU in about a minute, real enough that everything works as with Qwen2-VL-2B. It knows
nothing else of the world. Written by the `base_model` pipeline; do not edit by hand.

> {prompt}
>
> {example}

## How it was made

From random weights, in float32 on a CPU, stored as bfloat16, on freshly drawn {side}x{side} pictures. First the
vision tower: {tower.steps:,} steps of {tower.batch_size} pictures, each image token to point at the words of what it
covers. Then the language model over the frozen tower: {language.steps:,} steps of {language.batch_size}
conversations, only the answers and their end token scored. AdamW, learning rate {language.learning_rate}, seed {seed}.
`kedro run --pipeline base_model` makes it again; `tiny/pretraining.py` holds the recipe.

No data of third parties: pictures, questions and answers are drawn by `tiny/`. A picture holds two to four objects
(2 sizes, 8 colours, 6 shapes, 16 cells) on one of 4 backgrounds. More than half of the conversations are one
full description; the rest are lists, questions about place, number, colour, shape, size and relation, several turns,
two pictures, and text alone. The byte-level vocabulary was trained on the same texts; special tokens, their
names and the chat format are Qwen2-VL's.

## How good it is

Measured on {quality.num_scenes} scenes of the held-out partition with greedy answers to `{prompt}`. Scenes are
split by the sha256 of what can be said of them, so none of these descriptions occurs in pre-training or in the
default fine-tuning data.

| | |
|---|---|
| attributes right (background; size, colour, shape of each object in reading order) | {quality.attributes_right:.1%} |
| scenes with every attribute right | {quality.descriptions_right:.1%} |
| attributes right with the picture blanked | {quality.attributes_right_blanked:.1%} |
| the most to be expected by chance | {quality.chance:.1%} |
| pairs whose answers swap when their pictures do | {quality.pairs_swapped:.1%} |

Chance: every attribute is uniform and independent, so a blind guess is right once in 4 backgrounds, 2 sizes,
8 colours or 6 shapes; for three objects (1/4 + 3 (1/2 + 1/8 + 1/6)) / 10.

It reads pictures at {side}x{side} pixels, the size it was trained at.

## Licence

Apache-2.0, weights and drawings alike. No weights of Qwen were used.
"""


def build_tiny_base(directory: Path, recipe: PretrainingRecipe) -> Path:
    """Pre-train in `directory` (or resume from its checkpoint) and return the finished model's folder in it."""
    model, processor = pretrain(recipe, directory)
    finished = directory / "model"
    shutil.rmtree(finished, ignore_errors=True)
    # Half the size; the card's figures are measured on the stored weights.
    model.to(torch.bfloat16).save_pretrained(finished)
    processor.save_pretrained(finished)
    # safetensors writes files that only the owner may read; the model has the project's permissions.
    (finished / "model.safetensors").chmod(0o644)
    (scene,) = held_out_scenes(1, seed=0)
    (example,) = caption_pictures(model.float(), processor, [draw_picture(scene)])
    card = _CARD.format(
        tower=recipe.tower,
        language=recipe.language,
        seed=recipe.seed,
        quality=measure_quality(finished),
        parameters=model.num_parameters(),
        prompt=DESCRIBE_PROMPT,
        example=example,
        side=PICTURE_SIDE,
    )
    (finished / "README.md").write_text(card, encoding="utf-8")
    return finished
