"""The before/after page: one HTML file that asks nothing of the network and of no other file.

Cards are written as HTML, not as data for the script, so the page reads and prints without
JavaScript, and no caption is ever parsed by the script. Knows nothing of where runs and pictures lie.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup
from PIL import Image

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.scoring.metrics import FEW_IMAGES, METRICS
from qwen_vl_lora.scoring.predictions import Prediction, read_predictions
from qwen_vl_lora.scoring.wording import Piece, differing_words, nearest_reference

OpenImage = Callable[[str], Image.Image]

_TEMPLATES = Path(__file__).parent
_THUMBNAIL_SIDE = 320  # px; shown at up to 160 CSS px, so it stays sharp on dense screens
_THUMBNAIL_QUALITY = 70
_MAX_THUMBNAILS = 500  # of about 8 kB each: the page stays a few MB


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What was trained on what. Mappings are shown in their order; values may nest.

    Attributes:
        name: of the run, as a reader calls it: the recipe, or the recipe and a date.
        created: when, or the run id that says so.
        base_model: id or path.
        adapter: the settings a reader asks for first: rank, alpha, targets, trainable parameters.
        data: counts: training, validation and test images and captions, source.
        settings: the run's parameters.
        lineage: run id, commit, versions of data and weights that were read and written.
        differences: settings that are not the same in all runs of the page.
    """

    name: str
    created: str
    base_model: str
    adapter: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    lineage: Mapping[str, Any]
    differences: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReportRun:
    """One run: `predictions`, and what `score_predictions` made of them."""

    facts: ReportFacts
    predictions: pd.DataFrame
    scores: pd.DataFrame
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The caption one run's tuned model gave to an image, marked against the nearest reference."""

    run: str
    pieces: list[Piece]
    cider: float
    rouge_l: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Card:
    """One held-out image."""

    image_id: str
    thumbnail: str | None
    prompt: str
    base_caption: str
    base_cider: float
    gain: float
    answers: list[Answer]
    references: list[list[Piece]]


def render_report(runs: Sequence[ReportRun], open_image: OpenImage) -> str:
    """The page of one run, or of several side by side.

    The images are those of the first run; another run's captions stand beside them where it was
    asked the same about the same picture. Base captions are the first run's.

    Args:
        open_image: the picture of an `image_path`. Whatever it raises becomes a placeholder.

    Raises:
        DataFormatError: when no run is given, or a run's scores do not belong to its predictions.
    """
    if not runs:
        raise DataFormatError("A report needs at least one run, came none.")
    cards = _cards(runs, open_image)
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=_signed, shown=_shown)
    return environment.get_template("report.html").render(
        runs=runs,
        cards=cards,
        headline=_headline(runs[0]),
        warnings=_warnings(runs),
        metric_names=METRICS,
        style=Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        num_without_picture=max(0, len(cards) - _MAX_THUMBNAILS),
    )


def _headline(run: ReportRun) -> str:
    count = run.metrics["num_images"]
    base, tuned = run.metrics["base"]["CIDEr"], run.metrics["tuned"]["CIDEr"]
    return f"CIDEr {base:.2f} → {tuned:.2f} on {count} held-out image{'' if count == 1 else 's'}"


def _warnings(runs: Sequence[ReportRun]) -> list[str]:
    warnings = []
    few = min(run.metrics["num_images"] for run in runs)
    if any(len(run.predictions) == 1 for run in runs):
        warnings.append("CIDEr weighs words by how many captions lack them: of a single one it is always 0.")
    if few < FEW_IMAGES:
        warnings.append(
            f"Metrics on {few} image{'' if few == 1 else 's'} mean little. "
            f"Hold out at least {FEW_IMAGES} (split.test_images) to compare numbers; read the captions instead."
        )
    if len({tuple(sorted(map(_picture, run.predictions["image_path"].astype(str)))) for run in runs}) > 1:
        warnings.append("These runs were scored on different images: compare captions, not metrics.")
    if len({run.metrics["tokenizer"] for run in runs}) > 1:
        warnings.append("These runs were scored with different tokenizers: their metrics cannot be compared.")
    return warnings


def _cards(runs: Sequence[ReportRun], open_image: OpenImage) -> list[Card]:
    """Failures first: lowest tuned CIDEr, then ROUGE-L, of the first run."""
    rows = sorted(_rows(runs[0]), key=lambda row: (row[1]["tuned_cider"], row[1]["tuned_rouge_l"]))
    others = [(run.facts.name, {_question(item): (item, scores) for item, scores in _rows(run)}) for run in runs[1:]]
    cards = []
    for rank, (item, scores) in enumerate(rows):
        beside = [_answer(name, *found[_question(item)]) for name, found in others if _question(item) in found]
        answers = [_answer(runs[0].facts.name, item, scores), *beside]
        thumbnail = _thumbnail(item.image_path, open_image) if rank < _MAX_THUMBNAILS else None
        cards.append(_card(item, scores, answers, thumbnail))
    return cards


def _rows(run: ReportRun) -> list[tuple[Prediction, Mapping[str, Any]]]:
    predictions = read_predictions(run.predictions)
    scores = [{str(key): value for key, value in row.items()} for row in run.scores.to_dict("records")]
    if [item.image_id for item in predictions] != [str(row["image_id"]) for row in scores]:
        raise DataFormatError(
            f"caption_scores of run {run.facts.name!r} name other images than its predictions. "
            "Give both from the same version: kedro run --pipeline evaluation writes them together."
        )
    return list(zip(predictions, scores, strict=True))


def _question(item: Prediction) -> tuple[str, str, tuple[str, ...]]:
    """What makes rows of two runs comparable: one picture may be asked about twice."""
    return _picture(item.image_path), item.prompt, item.references


def _picture(path: str) -> str:
    """Its file's name, which is its content: each recipe keeps its pictures in a folder of its own."""
    return path.rpartition("/")[2]


def _card(item: Prediction, scores: Mapping[str, Any], answers: list[Answer], thumbnail: str | None) -> Card:
    nearest = nearest_reference(item.tuned_caption, item.references)
    missing = differing_words(item.tuned_caption, item.references[nearest])[1]
    others = [[Piece(text, differs=False)] for i, text in enumerate(item.references) if i != nearest]
    return Card(
        image_id=item.image_id,
        thumbnail=thumbnail,
        prompt=item.prompt,
        base_caption=item.base_caption,
        base_cider=scores["base_cider"],
        gain=scores["cider_gain"],
        answers=answers,
        references=[missing, *others],
    )


def _answer(run: str, item: Prediction, scores: Mapping[str, Any]) -> Answer:
    reference = item.references[nearest_reference(item.tuned_caption, item.references)]
    return Answer(
        run=run,
        pieces=differing_words(item.tuned_caption, reference)[0],
        cider=scores["tuned_cider"],
        rouge_l=scores["tuned_rouge_l"],
        exact=bool(scores["tuned_exact_match"]),
    )


def _thumbnail(path: str, open_image: OpenImage) -> str | None:
    try:
        picture = open_image(path).convert("RGB")
    except Exception:  # the page is worth having without a picture that is gone, cut short or refused
        return None
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=_THUMBNAIL_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _signed(value: float, digits: int) -> str:
    """With its sign, and U+2212 for minus: as wide as the plus, so that columns align."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(str(item) for item in value)
    if isinstance(value, (str, float)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)
