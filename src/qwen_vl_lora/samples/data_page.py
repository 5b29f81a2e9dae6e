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

KINDS = {
    "split": "near-duplicate across the split",
    "suspicious": "suspicious",
    "duplicate": "duplicate",
    "long": "may be too long",
    "rejected": "rejected",
}
"""Facet of a finding → its name, in the order in which findings are shown."""

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
) -> Found:
    """Find the rows to look at. All of them may be, so only those that are shown are kept.

    Args:
        summary: `collection_summary`.
    """
    by_key: dict[Key, Finding] = {}
    kept: Counter[str] = Counter()
    facets_of: dict[str, dict[int, int]] = {}
    """Source → row → facets, a bit each."""
    places = list(KINDS)
    for facet, sample, reason in chain(
        _alike_across_the_split(samples, split_summary),
        _suspicious(samples, summary),
        _doubled(samples),
        _long(samples, images, settings),
    ):
        source, row = key = (sample.get("source", ""), sample["row"])
        rows = facets_of.setdefault(source, {})
        rows[row] = rows.get(row, 0) | 1 << places.index(facet)
        if key not in by_key:
            if kept[facet] == MAX_CARDS:  # facets come in the order of the page, so none of those is shown
                continue
            kept[facet] += 1
            by_key[key] = Finding(key, sample["id"], _answer(sample), next(iter(sample["images"]), None))
        by_key[key].reasons.append((facet, reason))
    found = [*by_key.values(), *_rejected(rejected_samples.head(MAX_CARDS), rejected_pictures)]
    found.sort(key=lambda finding: min(places.index(facet) for facet, _ in finding.reasons))
    sets = Counter(facets for rows in facets_of.values() for facets in rows.values())
    counts = {
        facet: sum(number for facets, number in sets.items() if facets >> place & 1)
        for place, facet in enumerate(places)
    } | {"rejected": len(rejected_samples)}
    return Found(_with_pictures(found[:MAX_CARDS], images), counts, sets.total() + len(rejected_samples))


def _answer(sample: Mapping[str, Any]) -> str:
    return " ".join(turn["text"] for turn in sample["turns"] if turn["role"] == "assistant")


_Reasons = Iterator[tuple[str, Mapping[str, Any], str]]
"""Facet, sample, sentence."""


def _alike_across_the_split(samples: Sequence[Mapping[str, Any]], split_summary: Mapping[str, Any]) -> _Reasons:
    """Samples whose picture looks like one on another side: the test would measure what was trained."""
    others: dict[str, str] = {}
    for pair in split_summary["near_duplicates"]["nearest"]:
        (one, other), (side, other_side) = (map(_sha256_of, pair["images"]), pair["sides"])
        alike = f"of 256 bits of the look {pair['distance']} differ"
        others.setdefault(one, f"on side {side}; looks like a picture of {other_side} ({other[:12]}): {alike}")
        others.setdefault(other, f"on side {other_side}; looks like a picture of {side} ({one[:12]}): {alike}")
    for sample in samples:
        for sha256 in sample["images"]:
            if sha256 in others:
                yield "split", sample, others[sha256]


def _sha256_of(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _suspicious(samples: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> _Reasons:
    """Samples with a picture that the collection found suspicious."""
    kinds = {
        sha256: found["kind"].replace("_", " ")
        for found in summary["suspicious"]
        for sha256 in found.get("pictures", [found.get("sha256")])
    }
    for sample in samples:
        for kind in dict.fromkeys(kinds[sha256] for sha256 in sample["images"] if sha256 in kinds):
            yield "suspicious", sample, kind


def _doubled(samples: Sequence[Mapping[str, Any]]) -> _Reasons:
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
            yield "duplicate", sample, f"the same picture and text as row {earlier[place]}"
        else:
            yield "duplicate", sample, f"the same picture as {first_id[sample['images'][0]]}"


def _long(samples: Sequence[Mapping[str, Any]], images: ImageStore, settings: Parameters) -> _Reasons:
    """Samples that are longer than `max_length` by an estimate: the exact number is the tokenizer's."""
    for sample in samples:
        tokens = _estimate_tokens(sample, images, settings)
        if tokens > settings.max_length:
            yield (
                "long",
                sample,
                f"about {tokens} tokens; training leaves out more than max_length {settings.max_length}",
            )


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


def _rejected(rejected_samples: pd.DataFrame, pictures: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    more = {(known["row"], known["image_id"]): known for known in pictures}
    for bad in rejected_samples.to_dict("records"):
        known = more.get((bad["row"], bad["image_id"]), {})
        yield Finding(
            (known.get("source") or "", bad["row"]),
            str(bad["image_id"]),
            picture=known.get("picture"),
            listed=bad["reason"] == "excluded",
            is_listed=bad["reason"] == "excluded",
            reasons=[("rejected", f"{bad['reason']}: {bad['detail']}")],
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
) -> str:
    """The page, from `find_all`, `caption_statistics` and `split_summary`."""
    lengths = Counter(len(_answer(sample).split()) for sample in samples)
    return render_page(
        Path(__file__).parent,
        "data_page",
        title=f"Data before training: {len(samples)} samples",
        skip_to="rows",
        found=found.cards,
        num_found=found.number,
        num_samples=len(samples),
        num_images=statistics["images"],
        source=sentence(statistics["collection"]),
        statistics=statistics,
        split=split_summary,
        facets=[(facet, name, found.counts[facet]) for facet, name in KINDS.items() if found.counts[facet]],
        kinds=KINDS,
        shown_characters=_SHOWN_CHARACTERS,
        max_length=settings.max_length,
        num_long=found.counts["long"],
        lengths=_bars(lengths),
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """A column of a histogram."""

    tick: str
    label: str
    count: int
    percent: int


def _bars(lengths: Mapping[int, int]) -> list[Bar]:
    """How many answers have how many words, from the number of answers of each length."""
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
            f"{edge} to {edge + step - 1} words: {counts[place]}",
            counts[place],
            round(100 * counts[place] / most),
        )
        for place, edge in enumerate(range(0, max(lengths) + 1, step))
    ]
