"""What the first screen of the comparison page says: three captions to look at, and how captions changed and fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from qwen_vl_lora.evaluation.wording import Piece, words_of

if TYPE_CHECKING:
    from qwen_vl_lora.evaluation.report import Card

_NAMED_WORDS = 4
_MIN_MISSES = 2
"""A word that one caption lacks is no common fault."""


@dataclass(frozen=True, slots=True)
class Highlight:
    """A card on the first screen and why it is there."""

    why: str
    card: Card


def highlights(cards: Sequence[Card], labels: Sequence[str]) -> list[Highlight]:
    """A gain, a typical caption and a failure; of several runs the captions in which first and last differ most.

    Args:
        cards: failures first.
    """
    if len(labels) > 1:
        both = [card for card in cards if len(card.answers) == len(labels)] or list(cards)

        def lead(card: Card) -> float:
            return card.answers[-1].cider - card.answers[0].cider

        chosen = [
            (f"Where {labels[-1]} leads most", max(both, key=lead)),
            (f"Where {labels[0]} leads most", min(both, key=lead)),
            ("A failure of all runs", min(both, key=lambda card: max(answer.cider for answer in card.answers))),
        ]
    else:
        chosen = [
            ("Largest gain", max(cards, key=lambda card: card.gain)),
            ("A typical caption", cards[len(cards) // 2]),
            ("A failure", cards[0]),
        ]
    once: dict[str, Highlight] = {}
    for why, card in chosen:
        once.setdefault(card.anchor, Highlight(why, card))
    return list(once.values())


def tell_change(cards: Sequence[Card], place: int, unit: str) -> list[str]:
    """Sentences on the captions of run number `place`: their length, exact ones, and what the others have in common.

    Args:
        unit: words or characters.
    """
    answered = [(card, answer) for card in cards for answer in card.answers if answer.place == place]
    if not answered:
        return []
    lengths = [
        median(len(words_of(text)) for text in texts)
        for texts in (
            [card.base_caption for card, _ in answered],
            ["".join(piece.text for piece in answer.pieces) for _, answer in answered],
            [card.reference for card, _ in answered],
        )
    ]
    base, tuned, reference = (f"{length:g}" for length in lengths)
    missed = [(answer.pieces, answer.missing) for _, answer in answered if not answer.exact]
    said = [
        f"Base captions have {base} {unit} in the median, tuned ones {tuned}, their references {reference}.",
        f"{len(answered) - len(missed)} of {len(answered)} tuned captions equal a reference.",
    ]
    return [*said, *_tell_misses(missed)]


def _tell_misses(missed: Sequence[tuple[Sequence[Piece], Sequence[Piece]]]) -> list[str]:
    """What captions that differ have in common: the words that they most often lack and add."""
    if len(missed) < _MIN_MISSES:
        return []
    lacking = _most_common(wanted for _, wanted in missed)
    added = _most_common(given for given, _ in missed)
    parts = [f"lack {lacking}" if lacking else "", f"say {added} instead" if added else ""]
    told = " and ".join(filter(None, parts)) or "have no wrong word in common"
    often = "most often " if lacking or added else ""
    return [f"The {len(missed)} others {often}{told}."]


def _most_common(captions: Iterable[Sequence[Piece]]) -> str:
    """The words in which most captions differ, with the number of captions."""
    counts = Counter(
        word
        for pieces in captions
        for word in {word for piece in pieces if piece.differs for word in words_of(piece.text)}
    )
    common = [(word, count) for word, count in counts.most_common(_NAMED_WORDS) if count >= _MIN_MISSES]
    return ", ".join(f"“{word}” ({count})" for word, count in common)
