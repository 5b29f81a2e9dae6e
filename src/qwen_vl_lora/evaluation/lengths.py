"""How long captions are, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from qwen_vl_lora.evaluation.predictions import Prediction
from qwen_vl_lora.evaluation.wording import words_of

LONG = 40
"""Words in the median reference above which CIDEr means little."""

TIMES = 3
"""A phrase that stands this often in a row is a loop."""

_LONGEST_PHRASE = 32
"""Words of a phrase that is looked for."""


def measure_lengths(predictions: Sequence[Prediction], sides: Sequence[str]) -> dict[str, Any]:
    """Median words of the references and of each side's captions, and how many captions of each side have a loop."""
    words = {side: [words_of(item.written(side).caption) for item in predictions] for side in sides}
    references = [len(words_of(text)) for item in predictions for text in item.references]
    return {
        "words": {
            "references": float(median(references)),
            **{side: float(median(map(len, captions))) for side, captions in words.items()},
        },
        "loops": {side: sum(map(has_loop, captions)) for side, captions in words.items()},
    }


def has_loop(words: Sequence[str]) -> bool:
    """Whether a phrase of up to 32 words stands three times in a row, as in `a cat and a cat and a cat and`."""
    longest = min(_LONGEST_PHRASE, len(words) // TIMES)
    return any(_repeats(words, length) for length in range(1, longest + 1))


def _repeats(words: Sequence[str], length: int) -> bool:
    """Whether (TIMES - 1) · length words in a row equal those `length` places before them."""
    run = 0
    for word, before in zip(words[length:], words, strict=False):
        run = run + 1 if word == before else 0
        if run == (TIMES - 1) * length:
            return True
    return False


def main_metric(metrics: Mapping[str, Any]) -> str:
    """The metric to tell first."""
    return "ROUGE-L" if is_long(metrics) else "CIDEr"


def is_long(metrics: Mapping[str, Any]) -> bool:
    """Whether the references are so long that CIDEr means little; false for metrics of older versions."""
    return float(metrics.get("words", {}).get("references", 0)) > LONG
