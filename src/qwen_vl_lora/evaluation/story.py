"""What the first screen of the comparison page says: three captions to look at, and how captions changed and fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from qwen_vl_lora.evaluation.wording import Piece, words_of
from qwen_vl_lora.pages.language import Language

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


def highlights(cards: Sequence[Card], labels: Sequence[str], language: Language) -> list[Highlight]:
    """A gain, a typical caption and a failure; of several runs the captions in which first and last differ most.

    Args:
        cards: failures first.
    """
    if len(labels) > 1:
        both = [card for card in cards if len(card.answers) == len(labels)] or list(cards)

        def lead(card: Card) -> float:
            return card.answers[-1].cider - card.answers[0].cider

        chosen = [
            (language("leads_most", label=labels[-1]), max(both, key=lead)),
            (language("leads_most", label=labels[0]), min(both, key=lead)),
            (language("failure_of_all"), min(both, key=lambda card: max(answer.cider for answer in card.answers))),
        ]
    else:
        chosen = [
            (language("largest_gain"), max(cards, key=lambda card: card.gain)),
            (language("typical"), cards[len(cards) // 2]),
            (language("failure"), cards[0]),
        ]
    once: dict[str, Highlight] = {}
    for why, card in chosen:
        once.setdefault(card.anchor, Highlight(why, card))
    return list(once.values())


def tell_change(cards: Sequence[Card], place: int, unit: str, language: Language) -> list[str]:
    """Sentences on the captions of run number `place`: their length, exact ones, and what the others have in common.

    Args:
        unit: what captions are counted in, as the page calls it.
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
        language("lengths_told", base=base, tuned=tuned, reference=reference, unit=unit),
        language("exact_told", exact=len(answered) - len(missed), all=len(answered)),
    ]
    return [*said, *_tell_misses(missed, language)]


def _tell_misses(missed: Sequence[tuple[Sequence[Piece], Sequence[Piece]]], language: Language) -> list[str]:
    """What captions that differ have in common: the words that they most often lack and add."""
    if len(missed) < _MIN_MISSES:
        return []
    lacking = _most_common((wanted for _, wanted in missed), language)
    added = _most_common((given for given, _ in missed), language)
    values = {"count": len(missed), **({"lacking": lacking} if lacking else {}), **({"added": added} if added else {})}
    key = {(True, True): "lack_and_add", (True, False): "lack", (False, True): "add", (False, False): "differ"}
    return [language(f"misses_{key[bool(lacking), bool(added)]}", **values)]


def _most_common(captions: Iterable[Sequence[Piece]], language: Language) -> str:
    """The words in which most captions differ, with the number of captions."""
    counts = Counter(
        word
        for pieces in captions
        for word in {word for piece in pieces if piece.differs for word in words_of(piece.text)}
    )
    common = [(word, count) for word, count in counts.most_common(_NAMED_WORDS) if count >= _MIN_MISSES]
    return language.join(language("word_count", word=word, count=count) for word, count in common)
