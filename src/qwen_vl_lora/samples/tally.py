"""Results of a collection: the facts of `collection_summary`, and the lines shown on the terminal."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.samples.image_stage import Picture
from qwen_vl_lora.samples.image_store import ImageEntry
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn

MAX_ROWS, MAX_KEYS = 1000, 50
"""Number of rows to name for each suspicious kind, and of keys that were not read; totals are always given."""

SHARED_IDS = 3
"""Number of ids, with as many different captions, that make one picture suspicious."""


class Tally:
    """Counts over the kept rows."""

    def __init__(self) -> None:
        self.rows = 0
        self._last: tuple[str | None, int] | None = None
        self._forms: Counter[str] = Counter()
        self._changed: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._splits: Counter[str] = Counter()
        self._plain: dict[str, list[int]] = {}
        self._sources: Counter[str] = Counter()
        self._ids: dict[str, str | set[str]] = {}
        """sha256 of a sample's only picture → its id, or its ids if it has several."""

    def add(
        self,
        given: SourceSample,
        turns: Sequence[Turn],
        pictures: Sequence[Picture],
        entries: Sequence[ImageEntry],
    ) -> None:
        """Count a kept sample with its cleaned turns, and its pictures as they are known now."""
        row = (given.source, given.row)
        if row != self._last:  # a row with several captions gives several samples
            self.rows += 1
            self._ignored.update(given.ignored)
            self._last = row
        self._forms[given.form] += 1
        originals = {turn.text for turn in given.turns}
        self._changed[given.form] += sum(turn.text not in originals for turn in turns)
        if given.split:
            self._splits[given.split] += 1
        if given.source is not None:
            self._sources[given.source] += 1
        if len(entries) == 1:
            (entry,) = entries
            known = self._ids.setdefault(entry.sha256, entry.id)
            if isinstance(known, set):
                known.add(entry.id)
            elif known != entry.id:
                self._ids[entry.sha256] = {known, entry.id}
        for picture in pictures:
            if picture.is_plain:
                self._plain.setdefault(picture.sha256, []).append(given.row)

    def summary(
        self,
        samples: Sequence[Mapping[str, Any]],
        rejections: Sequence[Rejection],
        collapses: Callable[[str], bool],
    ) -> dict[str, Any]:
        """Return `collection_summary`.

        Args:
            collapses: whether white space in the texts of a form was collapsed.
        """
        return {
            "rows": self.rows + len(rejections),
            "samples": len(samples),
            "rejected": dict(Counter(rejection.reason for rejection in rejections).most_common()),
            "forms": {
                form: {
                    "samples": number,
                    "collapse_whitespace": collapses(form),
                    "texts_changed": self._changed[form],
                }
                for form, number in self._forms.items()
            },
            "ignored_keys": dict(self._ignored.most_common(MAX_KEYS)),
            **({"splits": dict(self._splits)} if self._splits else {}),
            **({"sources": dict(self._sources)} if self._sources else {}),
            "suspicious": [*self._plain_pictures(), *self._shared_pictures(samples)],
        }

    def _plain_pictures(self) -> list[dict[str, Any]]:
        rows = [row for found in self._plain.values() for row in found]
        if not rows:
            return []
        pictures = list(self._plain)[:MAX_ROWS]
        return [{"kind": "picture_of_one_colour", "samples": len(rows), "rows": rows[:MAX_ROWS], "pictures": pictures}]

    def _shared_pictures(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Find one picture under many ids with different captions, such as a site's "no longer available" picture."""
        shared = {sha256 for sha256, ids in self._ids.items() if isinstance(ids, set) and len(ids) >= SHARED_IDS}
        if not shared:
            return []
        rows: dict[str, list[int]] = {}
        answers: dict[str, set[bytes]] = {}
        numbers: Counter[str] = Counter()
        for sample in samples:
            sha256 = sample["images"][0] if len(sample["images"]) == 1 else None
            if sha256 in shared:
                numbers[sha256] += 1
                if numbers[sha256] <= MAX_ROWS:
                    rows.setdefault(sha256, []).append(sample["row"])
                text = sample["turns"][-1]["text"].encode()
                answers.setdefault(sha256, set()).add(hashlib.blake2b(text, digest_size=16).digest())
        return [
            {
                "kind": "one_picture_under_many_ids",
                "sha256": sha256,
                "samples": numbers[sha256],
                "captions": len(answers[sha256]),
                "rows": found,
            }
            for sha256, found in rows.items()
            if len(answers[sha256]) >= SHARED_IDS
        ]


def sentence(summary: Mapping[str, Any], language: Language = ENGLISH) -> str:
    """Summarize a collection in one sentence of counts, for the pages."""
    rejected = sum(summary["rejected"].values())
    changed = sum(form["texts_changed"] for form in summary["forms"].values())
    suspicious = sum(found["samples"] for found in summary["suspicious"])
    reasons, ignored = _counted(summary["rejected"]), len(summary["ignored_keys"])
    parts = [
        language("samples_of_rows", samples=summary["samples"], rows=summary["rows"]),
        language("rejected_reasons", count=rejected, reasons=reasons)
        if rejected
        else language("rejected_count", count=0),
        *([language("texts_changed", count=changed)] if changed else []),
        *([language("keys_not_read", count=ignored)] if ignored else []),
        *([language("suspicious_samples", count=suspicious)] if suspicious else []),
    ]
    return language.clauses(parts)


def told(summary: Mapping[str, Any], rejected_file: str) -> list[str]:
    """Return the terminal lines of a collection: one for each way in which it differs from the file.

    Args:
        summary: `collection_summary`.
        rejected_file: path of `rejected_samples`.
    """
    lines = []
    rejected: Mapping[str, int] = summary["rejected"]
    if rejected:
        lines.append(
            f"rejected {sum(rejected.values())} of {summary['rows']} rows: {_counted(rejected)}; see {rejected_file}"
        )
    changed = sum(form["texts_changed"] for form in summary["forms"].values())
    if changed:
        lines.append(f"cleaning changed {changed} text{'s' if changed > 1 else ''} (white space, control characters)")
    if summary["ignored_keys"]:
        named = ", ".join(
            f"{name} ({number} row{'s' if number > 1 else ''})"
            for name, number in list(summary["ignored_keys"].items())[:8]
        )
        lines.append(f"not read: {named}")
    for found in summary["suspicious"]:
        rows = ", ".join(map(str, found["rows"][:5]))
        more = ", …" if found["samples"] > 5 else ""
        kind, number = found["kind"].replace("_", " "), found["samples"]
        lines.append(f"suspicious: {kind}: {number} sample{'s' if number > 1 else ''} (row {rows}{more})")
    return lines


def _counted(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in rejected.items())
