"""Where two captions differ in their words, for people to see.

Compares words without case and punctuation; Chinese, Japanese and Korean by character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby

from qwen_vl_lora.scoring.tokenization import CJK

_PIECE = re.compile(rf"[{CJK}]|[^\W_{CJK}]+(?:['’-][^\W_{CJK}]+)*|\s+|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a caption; joined, the pieces give the caption back."""

    text: str
    differs: bool


def nearest_reference(caption: str, references: Sequence[str]) -> int:
    """Index of the reference that shares the longest runs of words with the caption; the first of equals."""
    words = _words(_pieces(caption))
    ratios = [SequenceMatcher(None, words, _words(_pieces(text)), autojunk=False).ratio() for text in references]
    return max(range(len(references)), key=ratios.__getitem__)


def differing_words(caption: str, reference: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces: words of the caption that the reference lacks differ, and the other way round."""
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
    """Neighbours of one kind joined. What stands between two differing words is marked with them."""
    word = -1
    differs: list[bool] = []
    for text in pieces:
        word += _is_word(text)
        differs.append(_is_word(text) and word not in common)
    for i in range(1, len(pieces) - 1):
        differs[i] |= not _is_word(pieces[i]) and differs[i - 1] and differs[i + 1]
    runs = groupby(zip(pieces, differs, strict=True), key=lambda piece: piece[1])
    return [Piece("".join(text for text, _ in run), kind) for kind, run in runs]
