"""The words in which two captions differ, for display.

Compares words without case and punctuation; Chinese, Japanese and Korean by character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from qwen_vl_lora.evaluation.tokenization import CJK

_PIECE = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*|\s+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a caption; the pieces joined are the whole caption."""

    text: str
    differs: bool


def words_of(text: str) -> list[str]:
    """The words in which captions are compared, in lower case; of Chinese, Japanese and Korean the characters."""
    return _words(_pieces(text))


def nearest_reference(caption: str, references: Sequence[str]) -> int:
    """Index of the reference with the highest word similarity to the caption; the first one on a tie."""
    words = _words(_pieces(caption))
    ratios = [SequenceMatcher(None, words, _words(_pieces(text)), autojunk=False).ratio() for text in references]
    return max(range(len(references)), key=ratios.__getitem__)


def differing_words(caption: str, reference: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces. A word differs if the other text lacks it."""
    left, right = _pieces(caption), _pieces(reference)
    matcher = SequenceMatcher(None, _words(left), _words(right), autojunk=False)
    common = [block for block in matcher.get_matching_blocks() if block.size]
    left_common = {block.a + i for block in common for i in range(block.size)}
    right_common = {block.b + i for block in common for i in range(block.size)}
    return _marked(left, left_common), _marked(right, right_common)


def _pieces(text: str) -> list[str]:
    return _PIECE.findall(text)


def _is_word(piece: str) -> bool:
    return piece[0].isalnum()


def _words(pieces: Sequence[str]) -> list[str]:
    return [piece.lower() for piece in pieces if _is_word(piece)]


def _marked(pieces: Sequence[str], common: set[int]) -> list[Piece]:
    """Pieces with adjacent ones of one kind joined. Text between two differing words is marked too."""
    word = -1
    differs: list[bool] = []
    for text in pieces:
        word += _is_word(text)
        differs.append(_is_word(text) and word not in common)
    for i in range(1, len(pieces) - 1):
        differs[i] |= not _is_word(pieces[i]) and differs[i - 1] and differs[i + 1]
    runs = groupby(zip(pieces, differs, strict=True), key=lambda piece: piece[1])
    return [Piece("".join(text for text, _ in run), kind) for kind, run in runs]
