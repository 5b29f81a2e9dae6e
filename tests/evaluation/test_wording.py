from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.evaluation.wording import differing_words, nearest_reference


def marked(pieces: list) -> list[str]:
    return [piece.text for piece in pieces if piece.differs]


def test_words_are_compared_without_case_and_punctuation() -> None:
    caption, reference = differing_words("A red dog, sitting.", "a blue dog sitting")
    assert marked(caption) == ["red"]
    assert marked(reference) == ["blue"]


def test_a_run_of_differing_words_is_one_mark() -> None:
    caption, _ = differing_words("a dog to the left of a cat", "a dog above a cat")
    assert marked(caption) == ["to the left of"]


def test_chinese_is_marked_by_character() -> None:
    caption, reference = differing_words("一只黑色的狗。", "一只棕色的狗")
    assert marked(caption) == ["黑"]
    assert marked(reference) == ["棕"]


def test_the_nearest_reference_is_the_most_alike_and_the_first_of_equals() -> None:
    assert nearest_reference("a red dog", ["two cats", "A red dog sits.", "a red dog sits"]) == 1
    assert nearest_reference("", ["a dog", "a cat"]) == 0


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_pieces_give_the_text_back(caption: str, reference: str) -> None:
    left, right = differing_words(caption, reference)
    assert "".join(piece.text for piece in left) == caption
    assert "".join(piece.text for piece in right) == reference
