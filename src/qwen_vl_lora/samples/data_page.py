"""The data page: what was read, before anything is trained, as one HTML file.

It shows the rows that a person should look at, each with its picture, caption and reason, and writes the list of
those that the reader ticks for `captions.exclude`. It stays small for any number of rows: only these rows come with a
picture, and at most MAX_PICTURES of them.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.pages.language import ENGLISH, Language, Setting, choose_language
from qwen_vl_lora.pages.page import Anchors, picture_data, render_page, ticks
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.digests import Digests
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.tally import sentence
from qwen_vl_lora.samples.texts import spreadsheet_cell

if TYPE_CHECKING:
    import pandas as pd

MAX_PICTURES, PICTURE_SIDE = 400, 224
MAX_CARDS = 3000

KINDS = ("split", "suspicious", "duplicate", "long", "rejected")
"""Facets of findings, in the order in which they are shown."""

_BYTES_A_TOKEN = 4  # of UTF-8: English has about 4 letters a token, Chinese about 3 bytes a character
_FRAME_TOKENS = 24  # of the chat format around question and answer
_TOKEN_PIXELS = 28 * 28
_MOST_BARS = 12
_SHOWN_CHARACTERS = 600

Key = tuple[str, int]
"""A row: the name of its source, empty if there is one source only, and its number."""


@dataclass
class Finding:
    """A row to look at.

    Attributes:
        reasons: facet and sentence of each reason.
        sha256: of its first picture; None if it was rejected.
        listed: whether the reader can put it on the list, and `is_listed` whether it is there already.
    """

    key: Key
    image_id: str
    caption: str = ""
    sha256: str | None = None
    picture: str | None = None
    listed: bool = True
    is_listed: bool = False
    anchor: str = ""
    reasons: list[tuple[str, str]] = field(default_factory=list)

    @property
    def cell(self) -> str:
        """Its line in the list, as `exclusions` reads it."""
        texts = (str(self.key[1]), spreadsheet_cell(self.image_id), spreadsheet_cell(self.key[0]))
        return ",".join('"' + text.replace('"', '""') + '"' for text in texts)

    @property
    def facets(self) -> str:
        return " ".join(dict.fromkeys(facet for facet, _ in self.reasons))


def language_of_samples(setting: Setting, samples: Sequence[Mapping[str, Any]]) -> Language:
    """The language that `report.language` asks for; `auto` decides by the answers."""
    return choose_language(setting, map(_answer, samples))


class Found(NamedTuple):
    """The rows to look at.

    Attributes:
        cards: those with the gravest reason first, at most MAX_CARDS.
        counts: facet → number of rows.
        number: of all rows.
    """

    cards: list[Finding]
    counts: Mapping[str, int]
    number: int


def find_all(
    samples: Sequence[Mapping[str, Any]],
    images: ImageStore,
    rejected_samples: pd.DataFrame,
    rejected_pictures: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    split_summary: Mapping[str, Any],
    settings: Parameters,
    language: Language = ENGLISH,
) -> Found:
    """Find the rows to look at. All of them may be, so only those that are shown are kept.

    Args:
        summary: `collection_summary`.
    """
    by_key: dict[Key, Finding] = {}
    kept: Counter[str] = Counter()
    facets_of: dict[str, dict[int, int]] = {}
    """Source → row → facets, a bit each."""
    for facet, sample, reason in chain(
        _alike_across_the_split(samples, split_summary, language),
        _suspicious(samples, summary, language),
        _doubled(samples, language),
        _long(samples, images, settings, language),
    ):
        source, row = key = (sample.get("source", ""), sample["row"])
        rows = facets_of.setdefault(source, {})
        rows[row] = rows.get(row, 0) | 1 << KINDS.index(facet)
        if key not in by_key:
            if kept[facet] == MAX_CARDS:  # facets come in the order of the page, so none of those is shown
                continue
            kept[facet] += 1
            by_key[key] = Finding(key, sample["id"], _answer(sample), next(iter(sample["images"]), None))
        by_key[key].reasons.append((facet, reason))
    found = [*by_key.values(), *_rejected(rejected_samples.head(MAX_CARDS), rejected_pictures, language)]
    found.sort(key=lambda finding: min(KINDS.index(facet) for facet, _ in finding.reasons))
    sets = Counter(facets for rows in facets_of.values() for facets in rows.values())
    counts = {
        facet: sum(number for facets, number in sets.items() if facets >> place & 1)
        for place, facet in enumerate(KINDS)
    } | {"rejected": len(rejected_samples)}
    return Found(_with_pictures(found[:MAX_CARDS], images), counts, sets.total() + len(rejected_samples))


def _answer(sample: Mapping[str, Any]) -> str:
    return " ".join(turn["text"] for turn in sample["turns"] if turn["role"] == "assistant")


_Reasons = Iterator[tuple[str, Mapping[str, Any], str]]
"""Facet, sample, sentence."""


def _alike_across_the_split(
    samples: Sequence[Mapping[str, Any]], split_summary: Mapping[str, Any], language: Language
) -> _Reasons:
    """Samples whose picture looks like one on another side: the test would measure what was trained."""
    others: dict[str, str] = {}
    for pair in split_summary["near_duplicates"]["nearest"]:
        shas, sides = list(map(_sha256_of, pair["images"])), [language(f"side_{side}") for side in pair["sides"]]
        for one, other in ((0, 1), (1, 0)):
            named = {"side": sides[one], "other": sides[other], "sha256": shas[other][:12]}
            others.setdefault(shas[one], language("looks_alike", distance=pair["distance"], **named))
    for sample in samples:
        for sha256 in sample["images"]:
            if sha256 in others:
                yield "split", sample, others[sha256]


def _sha256_of(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _suspicious(samples: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], language: Language) -> _Reasons:
    """Samples with a picture that the collection found suspicious."""
    kinds = {
        sha256: language(f"suspicious_{found['kind']}")
        for found in summary["suspicious"]
        for sha256 in found.get("pictures", [found.get("sha256")])
    }
    for sample in samples:
        for kind in dict.fromkeys(kinds[sha256] for sha256 in sample["images"] if sha256 in kinds):
            yield "suspicious", sample, kind


def _doubled(samples: Sequence[Mapping[str, Any]], language: Language) -> _Reasons:
    """Samples with the picture and the answer of an earlier one, or with the picture of an earlier id."""
    import numpy as np

    first_id: dict[str, str] = {}
    said, rows, is_renamed = Digests(), array("q"), bytearray()
    for place, sample in enumerate(samples):
        pictures = sample["images"]
        turns = [(turn["role"], turn["text"]) for turn in sample["turns"]]
        said.add(json.dumps([pictures, turns] if pictures else place))
        rows.append(sample["row"])
        is_renamed.append(
            bool(pictures) and first_id.setdefault(pictures[0], sample["image_ids"][0]) != sample["image_ids"][0]
        )
    numbers = np.frombuffer(rows, dtype=np.int64)
    earlier = numbers[said.first_places()]
    is_said = earlier != numbers
    for place in np.flatnonzero(is_said | np.frombuffer(is_renamed, dtype=bool)).tolist():
        sample = samples[place]
        if is_said[place]:
            yield "duplicate", sample, language("same_picture_and_text", row=int(earlier[place]))
        else:
            yield "duplicate", sample, language("same_picture", image_id=first_id[sample["images"][0]])


def _long(
    samples: Sequence[Mapping[str, Any]], images: ImageStore, settings: Parameters, language: Language
) -> _Reasons:
    """Samples that are longer than `max_length` by an estimate: the exact number is the tokenizer's."""
    for sample in samples:
        tokens = _estimate_tokens(sample, images, settings)
        if tokens > settings.max_length:
            yield "long", sample, language("about_tokens", tokens=tokens, max_length=settings.max_length)


def _estimate_tokens(sample: Mapping[str, Any], images: ImageStore, settings: Parameters) -> int:
    texts = [turn["text"] for turn in sample["turns"]]
    if all(turn["role"] == "assistant" for turn in sample["turns"]):
        texts.append(settings.prompt.user)
    pixels = [_pixels(images.by_sha256(sha256), settings) for sha256 in sample["images"]]
    return _FRAME_TOKENS + sum(pixels) // _TOKEN_PIXELS + sum(len(text.encode()) for text in texts) // _BYTES_A_TOKEN


def _pixels(entry: Any, settings: Parameters) -> int:
    image = settings.image
    if image.resized_height is not None and image.resized_width is not None:
        return image.resized_height * image.resized_width
    return max(image.min_pixels or 0, min(image.max_pixels or 0, entry.width * entry.height))


def _rejected(
    rejected_samples: pd.DataFrame, pictures: Sequence[Mapping[str, Any]], language: Language
) -> Iterator[Finding]:
    more = {(known["row"], known["image_id"]): known for known in pictures}
    for bad in rejected_samples.to_dict("records"):
        known = more.get((bad["row"], bad["image_id"]), {})
        why = language("rejected_because", reason=language(f"reason_{bad['reason']}"), detail=bad["detail"])
        yield Finding(
            (known.get("source") or "", bad["row"]),
            str(bad["image_id"]),
            picture=known.get("picture"),
            listed=bad["reason"] == "excluded",
            is_listed=bad["reason"] == "excluded",
            reasons=[("rejected", why)],
        )


def _with_pictures(found: list[Finding], images: ImageStore) -> list[Finding]:
    anchors, num_pictures = Anchors(), 0
    for finding in found:
        finding.anchor = anchors.give(finding.image_id)
        if finding.sha256 is not None and num_pictures < MAX_PICTURES:
            num_pictures += 1
            try:
                finding.picture = picture_data(images.open(finding.sha256), PICTURE_SIDE)
            except (DataFormatError, MissingArtifactError):  # the page is still useful without it
                continue
    return found


def render_data_page(
    found: Found,
    samples: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    split_summary: Mapping[str, Any],
    settings: Parameters,
    language: Language = ENGLISH,
) -> str:
    """The page, from `find_all`, `caption_statistics` and `split_summary`."""
    # Chinese has no spaces between words.
    unit = "characters" if language_of_samples("auto", samples).code == "zh" else "words"
    answers = map(_answer, samples)
    lengths = Counter(len(text) if unit == "characters" else len(text.split()) for text in answers)
    return render_page(
        Path(__file__).parent,
        "data_page",
        language,
        title=language("data_title", samples=len(samples)),
        skip_to="rows",
        found=found.cards,
        num_found=found.number,
        num_samples=len(samples),
        num_images=statistics["images"],
        source=sentence(statistics["collection"], language),
        statistics=statistics,
        split=split_summary,
        facets=[(facet, language(f"kind_{facet}"), found.counts[facet]) for facet in KINDS if found.counts[facet]],
        shown_characters=_SHOWN_CHARACTERS,
        max_length=settings.max_length,
        num_long=found.counts["long"],
        lengths=_bars(lengths, unit, language),
        length_unit=unit,
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """A column of a histogram."""

    tick: str
    label: str
    count: int
    percent: int


def _bars(lengths: Mapping[int, int], unit: str, language: Language) -> list[Bar]:
    """How many answers have how many words, or characters, from the number of answers of each length."""
    if not lengths:
        return []
    edges = [round(edge) for edge in ticks(max(*lengths, _MOST_BARS), _MOST_BARS)]
    step = edges[1]
    counts: Counter[int] = Counter()
    for length, number in lengths.items():
        counts[length // step] += number
    most = max(counts.values())
    return [
        Bar(
            str(edge),
            language("bar_label", low=edge, high=edge + step - 1, unit=language(unit), count=counts[place]),
            counts[place],
            round(100 * counts[place] / most),
        )
        for place, edge in enumerate(range(0, max(lengths) + 1, step))
    ]
