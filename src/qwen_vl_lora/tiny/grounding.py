"""Targets for the vision tower's own training stage: the words for what each image token covers.

Answers alone train a vision tower very slowly, because most of an answer's words do not depend
on the picture. So the tower is trained first: each image token predicts the words for what it
covers, in the language model's vocabulary. The language model is then trained on the finished tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwen_vl_lora.tiny.drawing import GRID, Placed, Scene

# An inner row is between two words; its share of both distinguishes it from all others. So do columns.
_ROW_WORDS = ({"top": 1.0}, {"top": 0.5, "middle": 0.5}, {"middle": 0.5, "bottom": 0.5}, {"bottom": 1.0})
_COLUMN_WORDS = ({"left": 1.0}, {"left": 0.5, "middle": 0.5}, {"middle": 0.5, "right": 0.5}, {"right": 1.0})

PLACE_WORDS = ("top", "middle", "bottom", "left", "right")


def covered_words(scene: Scene) -> list[dict[str, float]]:
    """Return for each image token, row by row, the words of what it covers with weights that sum to one.

    A token covers one cell: the background's word alone, or the background, the object's size, colour
    and shape, its row and its column in equal parts.
    """
    words = [{scene.background: 1.0} for _ in range(GRID * GRID)]
    for placed in scene.objects:
        words[placed.row * GRID + placed.column] = _words_of_object(placed, scene.background)
    return words


def word_targets(scenes: Sequence[Scene], word_ids: dict[str, int], vocabulary: int) -> torch.Tensor:
    """Return `covered_words` as distributions (image tokens of all scenes, vocabulary)."""
    tokens = [words for scene in scenes for words in covered_words(scene)]
    targets = torch.zeros(len(tokens), vocabulary)
    for target, words in zip(targets, tokens, strict=True):
        target[[word_ids[word] for word in words]] = torch.tensor(list(words.values()))
    return targets


def _words_of_object(placed: Placed, background: str) -> dict[str, float]:
    thing = placed.thing
    weights = dict.fromkeys((background, thing.size, thing.colour, thing.shape), 1.0)
    for places in (_ROW_WORDS[placed.row], _COLUMN_WORDS[placed.column]):
        for word, weight in places.items():
            weights[word] = weights.get(word, 0.0) + weight
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}
