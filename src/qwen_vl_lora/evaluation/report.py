"""The before/after page: metrics, captions and settings of one run, or of several side by side.

Independent of where runs and pictures are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from qwen_vl_lora.evaluation.drawings import histogram, loss_curves
from qwen_vl_lora.evaluation.lengths import is_long, main_metric
from qwen_vl_lora.evaluation.metrics import METRICS, mean_interval, notes_on_metrics
from qwen_vl_lora.evaluation.predictions import Prediction, read_predictions
from qwen_vl_lora.evaluation.story import highlights, tell_change
from qwen_vl_lora.evaluation.wording import Piece, differing_words, nearest_reference
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.pages.page import Anchors, picture_data, picture_side, render_page, signed

OpenImage = Callable[[str], Image.Image]

_MAX_PICTURES = 500
_FOLDED = ("BLEU-1", "BLEU-2", "BLEU-3")
_WORSE = 0.005
"""A smaller change of CIDEr is shown as 0.00."""
_NAMED_SETTINGS, _LONGEST_SETTING = 3, 24
_PER_CAPTION = {"CIDEr": "tuned_cider", "ROUGE-L": "tuned_rouge_l"}
"""Metrics that are means over captions, and their column of `caption_scores`."""


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """The facts of a run: model, adapter, data. Mappings are shown in their order; values may nest.

    Attributes:
        name: of the run for readers: the recipe, or the recipe and a date.
        created: time or run id.
        base_model: id or path.
        adapter: its main settings: rank, alpha, targets, trainable parameters.
        data: counts: training, validation and test images and captions, source.
        settings: the run's parameters.
        lineage: run id, commit, versions of data and weights that were read and written.
        differences: settings that differ between the runs of the page.
        notes: what a reader must know before the figures.
        made: when, how long, where and from which commit, in one sentence.
        curve: rows with `step` and `loss` or `validation_loss`.
        contenders: name → what it is.
    """

    name: str
    created: str
    base_model: str
    adapter: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    lineage: Mapping[str, Any]
    differences: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    made: str = ""
    curve: Sequence[Mapping[str, Any]] = ()
    contenders: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportRun:
    """One run: `predictions` and the results of `score_predictions`."""

    facts: ReportFacts
    predictions: pd.DataFrame
    scores: pd.DataFrame
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The caption one run's tuned model gave to an image, marked against the nearest reference.

    Attributes:
        place: number of the run on the page.
        gain: CIDEr of the tuned caption minus that of the run's base.
        missing: the nearest reference, with what the caption lacks.
        bin: facet of its column in the histogram.
    """

    place: int
    pieces: list[Piece]
    missing: list[Piece]
    cider: float
    gain: float
    exact: bool
    is_cut: bool
    bin: str


class Said(NamedTuple):
    """The caption of a contender."""

    name: str
    caption: str
    cider: float
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One held-out image.

    Attributes:
        reference: the one nearest to the first run's caption.
        references: that one with what the first run's caption lacks, then the others.
        contenders: of the first run.
        spread: highest minus lowest CIDEr of the runs.
        facets: what the buttons select it by.
    """

    anchor: str
    image_id: str
    picture: str | None
    prompt: str
    base_caption: str
    base_cider: float
    base_is_cut: bool
    gain: float
    answers: list[Answer]
    reference: str
    references: list[list[Piece]]
    contenders: list[Said]
    spread: float
    facets: str

    @property
    def alt(self) -> str:
        """What the picture shows, by its reference."""
        return f"{self.image_id}: {self.reference}"


class Difference(NamedTuple):
    """A metric of one run minus that of the first, and its 95 % interval where one can be computed."""

    value: float
    interval: tuple[float, float] | None


def render_report(runs: Sequence[ReportRun], open_image: OpenImage, language: Language = ENGLISH) -> str:
    """The page of one run, or of several side by side.

    The images are those of the first run. Captions of another run are shown beside them if it was
    asked the same question about the same picture. Base captions are the first run's.

    Args:
        open_image: opens the picture of an `image_path`. If it raises an error, a placeholder is shown.

    Raises:
        DataFormatError: when no run is given, a run has no picture of the first one, or a run's scores do not belong
            to its predictions.
    """
    if not runs:
        raise DataFormatError("A report needs at least one run; got none.")
    pictures = [set(map(_picture, run.predictions["image_path"].astype(str))) for run in runs]
    for run, own in zip(runs, pictures, strict=True):
        if pictures[0].isdisjoint(own):
            raise DataFormatError(
                f"Run {run.facts.name!r} captioned none of the pictures of {runs[0].facts.name!r}, so nothing can be "
                "compared. Name runs with the same held-out pictures; `qwen-vl-lora runs` shows the recipe of each."
            )
    tables = [_rows(run) for run in runs]
    ciders = [[row.scores["tuned_cider"] for row in table] for table in tables]
    drawn = [histogram(scores, f"b{n}", language) for n, scores in enumerate(ciders)]
    cards = _cards(tables, [facets for _, facets in drawn], open_image)
    labels, told = run_labels(runs, language), headline(*runs, language=language)
    differences = [_differences(runs[0], tables[0], *other) for other in zip(runs[1:], tables[1:], strict=True)]
    return render_page(
        Path(__file__).parent,
        "report",
        language,
        title=f"{told} · {runs[0].facts.name}",
        skip_to="captions",
        runs=runs,
        labels=labels,
        cards=cards,
        headline=told,
        lead=_lead(runs, labels, differences, language),
        warnings=_warnings(runs, language),
        highlights=highlights(cards, labels, language),
        stories=[tell_change(cards, n, language(_unit(run)), language) for n, run in enumerate(runs)],
        histograms=[bins for bins, _ in drawn],
        facets=_facets(cards, len(runs), language),
        curves=[loss_curves(run.facts.curve, language) for run in runs],
        bases=_bases(runs),
        differences=differences,
        is_nothing=is_nothing,
        metric_names=[name for name in reversed(METRICS) if name not in _FOLDED],
        folded_names=_FOLDED,
        has_cuts=any(map(_has_cut, cards)),
        num_without_picture=max(0, len(cards) - _MAX_PICTURES),
    )


def run_labels(runs: Sequence[ReportRun], language: Language = ENGLISH) -> list[str]:
    """What the runs are called on the page: what differs between them, such as `r=8`, or else their names."""
    if len(runs) == 1:
        return [language("tuned")]
    told = [
        [f"{key.rpartition('.')[2]}={value}" for key, value in run.facts.differences.items()][:_NAMED_SETTINGS]
        for run in runs
    ]
    labels = [", ".join(parts) for parts in told]
    is_short = all(parts and max(map(len, parts)) <= _LONGEST_SETTING for parts in told)
    return labels if is_short and len(set(labels)) == len(runs) else [run.facts.name for run in runs]


def headline(*runs: ReportRun, language: Language = ENGLISH) -> str:
    """The main metric before and after, or of each of several runs, with the number of images.

    Of long references a judge's verdict takes its place, if there is one.
    """
    metrics = runs[0].metrics
    count, metric = metrics["num_images"], main_metric(metrics)
    if len(runs) == 1 and is_long(metrics) and (told := verdict_on_base(metrics, language)):
        return told
    tuned = [f"{run.metrics['tuned'][metric]:.2f}" for run in runs]
    if len(runs) == 1:
        base = f"{metrics['base'][metric]:.2f}"
        return language("headline_one", metric=metric, base=base, tuned=tuned[0], count=count)
    named = zip(tuned, run_labels(runs, language), strict=True)
    scores = (language("headline_score", cider=cider, label=label) for cider, label in named)
    fewest, *_, most = sorted(run.metrics["num_images"] for run in runs)
    facts = {"metric": metric, "scores": language.join(scores)}
    if fewest == most:
        return language("headline_several", **facts, count=count)
    return language("headline_several_counts", **facts, fewest=fewest, most=most)


def verdict_on_base(metrics: Mapping[str, Any], language: Language) -> str | None:
    """How often the judge preferred the tuned side to the base; None without verdicts."""
    against = metrics.get("judge", {}).get("against", {}).get("base", {})
    if against.get("tuned_share") is None:
        return None
    share = language("percent", value=f"{100 * against['tuned_share']:.0f}")
    return language("headline_judged", share=share, count=against["judged"])


def _lead(
    runs: Sequence[ReportRun],
    labels: Sequence[str],
    differences: Sequence[Mapping[str, Difference]],
    language: Language,
) -> str:
    """The main change, or the differences between runs, with their intervals."""
    metrics, metric = runs[0].metrics, main_metric(runs[0].metrics)
    if len(runs) > 1:
        return language.clauses(
            language("label_minus_label", label=label, first=labels[0], change=_told_change(*found[metric], language))
            for label, found in zip(labels[1:], differences, strict=True)
            if metric in found
        )
    interval = metrics["confidence"]["delta"][metric] if "confidence" in metrics else None
    key = "mean_change" if metric == "CIDEr" else "mean_change_of"
    named = {} if metric == "CIDEr" else {"metric": metric}
    return language(key, change=_told_change(metrics["delta"][metric], interval, language), **named)


def _told_change(value: float, interval: Sequence[float] | None, language: Language) -> str:
    if interval is None:
        return signed(value, 2)
    low, high = (signed(end, 2) for end in interval)
    key = "with_interval_nothing" if is_nothing(value, interval, digits=2) else "with_interval"
    return language(key, value=signed(value, 2), low=low, high=high)


def is_nothing(value: float, interval: Sequence[float] | None, digits: int) -> bool:
    """Whether a change is none: its interval holds 0, or it is shown as 0."""
    return round(value, digits) == 0 or (interval is not None and interval[0] <= 0 <= interval[1])


def _unit(run: ReportRun) -> str:
    return "characters" if run.metrics["tokenizer"] == "characters" else "words"


def _bases(runs: Sequence[ReportRun]) -> list[int]:
    """Numbers of the runs whose base metrics are shown: the first alone if all are equal."""
    return [0] if all(run.metrics["base"] == runs[0].metrics["base"] for run in runs) else list(range(len(runs)))


def _facets(cards: Sequence[Card], num_runs: int, language: Language) -> list[tuple[str, str, int]]:
    """The buttons above the captions: facet, label, number of cards."""
    labels = {"exact": "facet_exact", "differs": "facet_differs", "worse": "facet_worse"}
    if num_runs > 1:
        labels = {"exact": "facet_exact_all", "differs": "facet_differs_one", "worse": "facet_worse_one"}
    return [
        (facet, language(key), sum(facet in card.facets.split() for card in cards)) for facet, key in labels.items()
    ]


def _warnings(runs: Sequence[ReportRun], language: Language) -> list[str]:
    notes = [[*run.facts.notes, *notes_on_metrics(run.metrics, len(run.predictions), language)] for run in runs]
    warnings = list(dict.fromkeys(note for of_run in notes for note in of_run))
    if len({tuple(sorted(map(_picture, run.predictions["image_path"].astype(str)))) for run in runs}) > 1:
        warnings.append(language("other_images"))
    if len({run.metrics["tokenizer"] for run in runs}) > 1:
        warnings.append(language("other_tokenizers"))
    return warnings


class _Row(NamedTuple):
    item: Prediction
    scores: Mapping[str, Any]


def _cards(tables: Sequence[Sequence[_Row]], facets: Sequence[Sequence[str]], open_image: OpenImage) -> list[Card]:
    """Failures first: lowest tuned CIDEr, then ROUGE-L, of the first run."""
    found = [
        {_question(row.item): (row, facet) for row, facet in zip(table, own, strict=True)}
        for table, own in zip(tables[1:], facets[1:], strict=True)
    ]
    rows = sorted(
        zip(tables[0], facets[0], strict=True),
        key=lambda row: (row[0].scores["tuned_cider"], row[0].scores["tuned_rouge_l"]),
    )
    side, anchors = picture_side(min(len(rows), _MAX_PICTURES)), Anchors()
    cards = []
    for rank, (row, facet) in enumerate(rows):
        question = _question(row.item)
        beside = [_answer(n, *other[question]) for n, other in enumerate(found, start=1) if question in other]
        picture = _picture_data(row.item.image_path, open_image, side) if rank < _MAX_PICTURES else None
        cards.append(_card(row, [_answer(0, row, facet), *beside], picture, anchors))
    return cards


def _rows(run: ReportRun) -> list[_Row]:
    predictions = read_predictions(run.predictions)
    scores = [{str(key): value for key, value in row.items()} for row in run.scores.to_dict("records")]
    if [item.image_id for item in predictions] != [str(row["image_id"]) for row in scores]:
        raise DataFormatError(
            f"caption_scores of run {run.facts.name!r} lists other images than its predictions. "
            "Give both from the same version: kedro run --pipeline evaluation writes them together."
        )
    return [_Row(*row) for row in zip(predictions, scores, strict=True)]


def _differences(
    first: ReportRun, ones: Sequence[_Row], other: ReportRun, others: Sequence[_Row]
) -> dict[str, Difference]:
    """Metrics of another run minus those of the first; means over captions with an interval, over common pictures.

    Empty if the runs have no question in common.
    """
    of_question = {_question(row.item): row for row in others}
    pairs = [(row, of_question[_question(row.item)]) for row in ones if _question(row.item) in of_question]
    if not pairs:
        return {}
    pictures = [_picture(row.item.image_path) for row, _ in pairs]
    found = {}
    for name in METRICS:
        value = other.metrics["tuned"][name] - first.metrics["tuned"][name]
        if column := _PER_CAPTION.get(name):
            gains = np.array([two.scores[column] - one.scores[column] for one, two in pairs])
            found[name] = Difference(float(gains.mean()), mean_interval(gains, pictures))
        else:
            found[name] = Difference(value, None)
    return found


def _question(item: Prediction) -> tuple[str, str, tuple[str, ...]]:
    """The key that matches rows of two runs. There may be several questions about one picture."""
    return _picture(item.image_path), item.prompt, item.references


def _picture(path: str) -> str:
    """The file name, a hash of the content: recipes store their pictures in different folders."""
    return path.rpartition("/")[2]


def _card(row: _Row, answers: list[Answer], picture: str | None, anchors: Anchors) -> Card:
    item = row.item
    nearest = nearest_reference(item.tuned_caption, item.references)
    others = [[Piece(text, differs=False)] for i, text in enumerate(item.references) if i != nearest]
    ciders = [answer.cider for answer in answers]
    return Card(
        anchor=anchors.give(item.image_id),
        image_id=item.image_id,
        picture=picture,
        prompt=item.prompt,
        base_caption=item.base_caption,
        base_cider=row.scores["base_cider"],
        base_is_cut=bool(item.base_cut),
        gain=row.scores["cider_gain"],
        answers=answers,
        reference=item.references[nearest],
        references=[answers[0].missing, *others],
        contenders=[
            Said(name, written.caption, row.scores[f"{name}_cider"], bool(written.cut))
            for name, written in item.contenders.items()
        ],
        spread=max(ciders) - min(ciders),
        facets=" ".join(_facets_of(answers)),
    )


def _has_cut(card: Card) -> bool:
    cuts = [card.base_is_cut, *(answer.is_cut for answer in card.answers), *(said.is_cut for said in card.contenders)]
    return any(cuts)


def _facets_of(answers: Sequence[Answer]) -> Iterator[str]:
    yield "exact" if all(answer.exact for answer in answers) else "differs"
    if any(answer.gain <= -_WORSE for answer in answers):
        yield "worse"
    yield from (answer.bin for answer in answers)


def _answer(place: int, row: _Row, facet: str) -> Answer:
    item = row.item
    reference = item.references[nearest_reference(item.tuned_caption, item.references)]
    pieces, missing = differing_words(item.tuned_caption, reference)
    return Answer(
        place=place,
        pieces=pieces,
        missing=missing,
        cider=row.scores["tuned_cider"],
        gain=row.scores["cider_gain"],
        exact=bool(row.scores["tuned_exact_match"]),
        is_cut=bool(item.tuned_cut),
        bin=facet,
    )


def _picture_data(path: str, open_image: OpenImage, side: int) -> str | None:
    try:
        return picture_data(open_image(path), side)
    except Exception:  # the report is still useful without a picture that is missing, damaged or refused
        return None
