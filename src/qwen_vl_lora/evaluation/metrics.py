"""BLEU, ROUGE-L and CIDEr of base and tuned captions by the official COCO scorers, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pycocoevalcap.bleu.bleu_scorer import BleuScorer  # type: ignore[import-untyped]
from pycocoevalcap.cider.cider import Cider  # type: ignore[import-untyped]
from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-untyped]

from qwen_vl_lora.evaluation.lengths import LONG, is_long, measure_lengths
from qwen_vl_lora.evaluation.predictions import SIDES, Prediction, contenders_in, read_predictions
from qwen_vl_lora.evaluation.tokenization import TOKENIZERS, Tokenizer, choose_tokenizer
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.pages.language import Language
from qwen_vl_lora.parameters import ScoringParameters

CONFIDENCE = 0.95
FEW_IMAGES = 50
"""With fewer images the intervals are so wide that metrics mean little."""

_MAX_ORDER = 4
_RESAMPLED_CELLS = 2_000_000  # weights in memory at once while resampling: 16 MB

Floats = npt.NDArray[np.float64]


Captions = Sequence[list[str]]
"""The tokens of each caption."""

References = Sequence[list[list[str]]]
"""For each caption the tokens of its references."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A score of single captions, whose value for a corpus is the mean over its captions.

    Attributes:
        name: in `caption_metrics` and on every page.
        column: in `caption_scores`, after `base_` or `tuned_`.
        score: from captions and their references to one score for each caption, in order.
    """

    name: str
    column: str
    score: Callable[[Captions, References], Sequence[float] | Floats]


def _rouge_l(captions: Captions, references: References) -> Floats:
    has_tokens = np.array([bool(tokens) for tokens in captions], dtype=float)
    _, scores = Rouge().compute_score(*_for_scorers(captions, references))
    # Rouge counts the empty caption as one empty token, which would match an empty reference.
    return np.asarray(scores * has_tokens)


def _cider(captions: Captions, references: References) -> Floats:
    """On the 0–10 scale, with the document frequencies of all references."""
    _, scores = Cider().compute_score(*_for_scorers(captions, references))
    return np.asarray(scores)


MEANS = (
    Metric("ROUGE-L", "rouge_l", _rouge_l),
    Metric("CIDEr", "cider", _cider),
)

METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", *(metric.name for metric in MEANS))


@dataclass(frozen=True, slots=True)
class SideScores:
    """Scores of one side, base or tuned; arrays have one entry or row for each caption, in order.

    Attributes:
        bleu_counts: (captions, 10): matching n-grams of order 1–4, n-grams of order 1–4, length of the
            caption, length of the closest reference. Corpus BLEU is a function of their sums.
        bleu_4: sentence BLEU-4.
        means: (captions, metrics): of each of `MEANS`.
        exact: 1 where the tokens equal those of one reference.
    """

    bleu_counts: Floats
    bleu_4: Floats
    means: Floats
    exact: Floats


def score_predictions(table: pd.DataFrame, parameters: ScoringParameters) -> tuple[dict[str, Any], pd.DataFrame]:
    """`caption_metrics` and `caption_scores` of a `predictions` table.

    Raises:
        DataFormatError: if the table is not a valid `predictions`, or no reference has a token.
    """
    predictions = read_predictions(table)
    name = choose_tokenizer(parameters.tokenizer, (text for item in predictions for text in item.references))
    tokenize = TOKENIZERS[name]
    references = [[tokenize(text) for text in item.references] for item in predictions]
    if not any(tokens for image in references for tokens in image):
        raise DataFormatError(
            f"No reference in predictions holds a token for the tokenizer `{name}`, so nothing can be scored. "
            "Check the captions of the source, or set scoring.tokenizer."
        )
    sides = [*SIDES, *contenders_in(table)]
    scores = {side: _score_side(_captions(predictions, side, tokenize), references) for side in sides}
    pictures = [item.image_path or item.image_id for item in predictions]
    metrics = {
        "num_images": len(set(pictures)),
        "tokenizer": name,
        **_corpus_metrics(scores),
        "exact_match": {side: float(scores[side].exact.mean()) for side in sides},
        "cut_captions": {side: count_cut(predictions, side) for side in sides},
        "confidence": _confidence(scores, pictures, parameters),
        **measure_lengths(predictions, sides),
    }
    return metrics, _caption_scores(table, scores)


def notes_on_metrics(metrics: Mapping[str, Any], num_captions: int, language: Language) -> Iterator[str]:
    """Yield what a reader must know before the figures.

    Args:
        metrics: `caption_metrics`.
        num_captions: rows of `predictions`.
    """
    if nothing_in_common(metrics, num_captions):
        yield language("nothing_in_common")
    if num_captions == 1:
        yield language("cider_of_one")
    if is_long(metrics):
        yield language("long_references", words=f"{metrics['words']['references']:g}", limit=LONG)
    if metrics["num_images"] < FEW_IMAGES:
        yield language("few_images", count=metrics["num_images"], least=FEW_IMAGES)


def nothing_in_common(metrics: Mapping[str, Any], num_captions: int) -> bool:
    """Whether no caption of either side says anything of its references. CIDEr weighs words by how telling they are.

    Args:
        metrics: `caption_metrics`.
        num_captions: rows of `predictions`; of one row CIDEr is always 0.
    """
    return num_captions > 1 and all(float(f"{metrics[side]['CIDEr']:.2f}") == 0 for side in SIDES)


def count_cut(predictions: Sequence[Prediction], side: str) -> int | None:
    """Captions that `generation.max_new_tokens` ended; None if the table lacks the columns."""
    cuts = [item.written(side).cut for item in predictions]
    return None if None in cuts else sum(map(bool, cuts))


def _captions(predictions: Sequence[Prediction], side: str, tokenize: Tokenizer) -> list[list[str]]:
    return [tokenize(item.written(side).caption) for item in predictions]


def _score_side(captions: Captions, references: References) -> SideScores:
    bleu_counts, bleu_4 = _bleu(captions, references)
    means = np.stack([np.asarray(metric.score(captions, references), dtype=float) for metric in MEANS], axis=1)
    exact = [float(bool(tokens) and tokens in image) for tokens, image in zip(captions, references, strict=True)]
    return SideScores(bleu_counts, bleu_4, means, np.array(exact))


def _for_scorers(captions: Captions, references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions as the official scorers take them: blank-separated tokens by image."""
    # The key is the row: two images may share an id.
    truths = {row: [" ".join(tokens) for tokens in image] for row, image in enumerate(references)}
    return truths, {row: [" ".join(tokens)] for row, tokens in enumerate(captions)}


def _bleu(captions: Captions, references: References) -> tuple[Floats, Floats]:
    """Counts behind corpus BLEU, and sentence BLEU-4, of each caption."""
    truths, results = _for_scorers(captions, references)
    scorer = BleuScorer(n=_MAX_ORDER)
    for row, (caption,) in results.items():
        scorer += (caption, truths[row])
    _, sentence = scorer.compute_score(option="closest", verbose=0)
    counts = [
        [
            *image["correct"],
            *image["guess"],
            image["testlen"],
            min((abs(length - image["testlen"]), length) for length in image["reflen"])[1],
        ]
        for image in scorer.ctest
    ]
    return np.array(counts, dtype=float), np.array(sentence[_MAX_ORDER - 1])


def corpus_bleu(sums: Floats) -> Floats:
    """BLEU-1 to 4 from summed counts (…, 10), as BleuScorer computes them: (…, 4)."""
    small, tiny = 1e-9, 1e-15  # BleuScorer's own guards against division by zero
    correct, guess, caption_length, reference_length = np.split(sums, (4, 8, 9), axis=-1)
    precision = np.cumprod((correct + tiny) / (guess + small), axis=-1) ** (1 / np.arange(1, _MAX_ORDER + 1))
    ratio = (caption_length + tiny) / (reference_length + small)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


def _side_metrics(scores: SideScores, weights: Floats) -> Floats:
    """METRICS of resampled corpora: weights (resamples, captions) say how often each caption is drawn."""
    means = weights @ scores.means / weights.sum(axis=1, keepdims=True)
    return np.concatenate([corpus_bleu(weights @ scores.bleu_counts), means], axis=1)


def _named(values: Floats) -> dict[str, float]:
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def _corpus_metrics(scores: Mapping[str, SideScores]) -> dict[str, Any]:
    once = np.ones((1, len(scores["base"].exact)))
    return _compared({side: _side_metrics(of_side, once) for side, of_side in scores.items()}, lambda v: _named(v[0]))


def _compared(sides: Mapping[str, Floats], show: Callable[[Floats], Any]) -> dict[str, Any]:
    """Base, tuned and tuned − base as shown, then each contender and tuned − contender.

    Args:
        sides: METRICS of each side, (resamples, metrics).
    """
    told = {"base": show(sides["base"]), "tuned": show(sides["tuned"]), "delta": show(sides["tuned"] - sides["base"])}
    contenders = {
        side: {"scores": show(values), "delta": show(sides["tuned"] - values)}
        for side, values in sides.items()
        if side not in SIDES
    }
    return {**told, **({"contenders": contenders} if contenders else {})}


def _confidence(
    scores: Mapping[str, SideScores], pictures: Sequence[str], parameters: ScoringParameters
) -> dict[str, Any]:
    """Percentile bootstrap over images. All sides share each resample, so the intervals of differences are paired.

    Captions of one image are drawn together, because they are not independent observations.

    CIDEr keeps the document frequencies of the whole test set: resampling them too would count a
    repeated image's words as common.
    """
    _, picture_of = np.unique(pictures, return_inverse=True)
    images = int(picture_of.max()) + 1
    rng = np.random.default_rng(parameters.seed)
    rows = max(1, _RESAMPLED_CELLS // len(pictures))
    sampled: dict[str, list[Floats]] = {side: [] for side in scores}
    for start in range(0, parameters.bootstrap_samples, rows):
        size = min(rows, parameters.bootstrap_samples - start)
        weights = rng.multinomial(images, np.full(images, 1 / images), size=size).astype(float)[:, picture_of]
        for side, of_side in scores.items():
            sampled[side].append(_side_metrics(of_side, weights))
    intervals = _compared({side: np.concatenate(values) for side, values in sampled.items()}, _intervals)
    return {"level": CONFIDENCE, "resamples": parameters.bootstrap_samples, **intervals}


def mean_interval(values: Floats, pictures: Sequence[str], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over captions; those of one image are drawn together."""
    _, picture_of = np.unique(pictures, return_inverse=True)
    images = int(picture_of.max()) + 1
    sums, counts = np.bincount(picture_of, values), np.bincount(picture_of)
    rng = np.random.default_rng(seed)
    rows = max(1, _RESAMPLED_CELLS // images)
    means: list[Floats] = []
    for start in range(0, resamples, rows):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(rows, resamples - start))
        means.append(weights @ sums / (weights @ counts))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _intervals(values: Floats) -> dict[str, list[float]]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(METRICS)}


def _caption_scores(table: pd.DataFrame, scores: Mapping[str, SideScores]) -> pd.DataFrame:
    columns: dict[str, Any] = {"image_id": table["image_id"].to_numpy()}
    for side in SIDES:
        columns |= _columns_of(side, scores[side])
    columns["cider_gain"] = columns["tuned_cider"] - columns["base_cider"]
    for side in contenders_in(table):
        columns |= _columns_of(side, scores[side])
    return pd.DataFrame(columns)


def _columns_of(side: str, scores: SideScores) -> dict[str, Any]:
    means = {f"{side}_{metric.column}": scores.means[:, place] for place, metric in reversed(list(enumerate(MEANS)))}
    return {**means, f"{side}_bleu_4": scores.bleu_4, f"{side}_exact_match": scores.exact.astype(bool)}
