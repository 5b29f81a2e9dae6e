"""Checks and cleans the turns of a sample: their order, texts and image slots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from qwen_vl_lora.samples.records import IMAGE_SLOT, Role, RowError, Turn
from qwen_vl_lora.samples.texts import clean_text, means_nothing, printable, says_something

ROLES: tuple[Role, ...] = get_args(Role)

_MARK = re.compile(
    r"</?(?:image|img|picture|video|audio|bbox|ref-object|image_?here|image_?placeholder)s?[ _-]?\d{0,4}\s?/?>",
    re.IGNORECASE,
)
"""A mark for something other than text in data sets: `<image1>`, `<image_1>`, `<video>`, `<bbox>`, …"""


def clean_turns(
    turns: Sequence[Turn], num_images: int, *, collapse_whitespace: bool, keep_nothing_words: bool = False
) -> tuple[Turn, ...]:
    """Return the turns of one sample with clean texts.

    Consecutive turns of one role are joined with a line break. A user turn that is only the sample's one picture
    is removed, which makes the sample a caption. Turns after the last scored answer are removed, because nothing
    is trained from them.

    Args:
        keep_nothing_words: keep answers such as `None` and `N/A`.

    Raises:
        RowError: when a text, the order of the turns, a mark or the number of image slots is not valid.
    """
    joined = _join_turns(_place_image_of_answer(turns, num_images))
    check_order([turn.role for turn in joined])
    scored = _end_with_scored(joined)
    cleaned = _drop_bare_image(tuple(_clean_turn(turn, collapse_whitespace, keep_nothing_words) for turn in scored))
    num_slots = sum(turn.text.count(IMAGE_SLOT) for turn in cleaned if turn.role == "user")
    if has_question(cleaned) and num_slots != num_images:
        raise RowError(
            "placeholder_mismatch",
            f"The user turns have {num_slots} {IMAGE_SLOT} for {num_images} pictures; make the two numbers equal.",
        )
    if not has_question(cleaned) and num_images != 1:
        raise RowError(
            "placeholder_mismatch",
            f"An answer without a user turn is a caption of one picture; got {num_images} pictures.",
        )
    return cleaned


def has_question(turns: Sequence[Turn]) -> bool:
    """Whether a sample has a question; a sample without a user turn is a caption, whose question is `prompt`."""
    return any(turn.role == "user" for turn in turns)


def check_order(roles: Sequence[str]) -> None:
    """Allow `[system] (user assistant)+`, and `[system] assistant` for a caption.

    Raises:
        RowError: `wrong_roles`, `no_answer` or `odd_turns`.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise RowError("wrong_roles", f"The role {printable(repr(unknown[0]))} is not one of {', '.join(ROLES)}.")
    if "assistant" not in roles:
        raise RowError("no_answer", "There is no assistant turn, so there is nothing to train.")
    spoken = list(roles[1:] if roles[0] == "system" else roles)
    if spoken == ["assistant"]:
        return
    if len(spoken) % 2:
        raise RowError("odd_turns", f"There are {len(spoken)} turns; each user turn needs an assistant turn.")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError("wrong_roles", f"After an optional system turn, user and assistant alternate; got {spoken}.")


def _place_image_of_answer(turns: Sequence[Turn], num_images: int) -> Sequence[Turn]:
    """Handle pre-training data, `<image>A dog.` without a question: the mark is the place of the picture."""
    answers = [turn for turn in turns if turn.role == "assistant"]
    if len(answers) != 1 or has_question(turns) or answers[0].text.count(IMAGE_SLOT) != num_images:
        return turns
    text = answers[0].text.replace(IMAGE_SLOT, "").lstrip("\n")
    return [replace(turn, text=text) if turn.role == "assistant" else turn for turn in turns]


def _join_turns(turns: Sequence[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for turn in turns:
        if not joined or joined[-1].role != turn.role:
            joined.append(turn)
        elif joined[-1].scored != turn.scored:
            raise RowError("wrong_roles", "Two answers follow each other, and only one of them is marked for training.")
        else:
            joined[-1] = replace(joined[-1], text=f"{joined[-1].text}\n{turn.text}")
    return joined


def _end_with_scored(turns: list[Turn]) -> list[Turn]:
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant" and turn.scored), default=None)
    if last is None:
        raise RowError("nothing_scored", "The flags of the turns leave no answer to train.")
    return turns[: last + 1]


def _drop_bare_image(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    questions = [turn.text.strip() for turn in turns if turn.role == "user"]
    return tuple(turn for turn in turns if turn.role != "user") if questions == [IMAGE_SLOT] else turns


def _clean_turn(turn: Turn, collapse_whitespace: bool, keep_nothing_words: bool) -> Turn:
    text = clean_text(turn.text, collapse_whitespace)
    _check_marks(turn.role, text)
    if turn.role == "assistant" and not says_something(text):
        raise RowError("empty_caption", f"The answer is {printable(repr(turn.text))}: nothing to train.")
    if turn.role == "assistant" and means_nothing(text) and not keep_nothing_words:
        raise RowError(
            "empty_caption",
            f"The answer is {printable(repr(turn.text))}, which stands for a missing caption. To keep it, "
            "set captions.nothing_words: keep.",
        )
    if turn.role != "assistant" and not says_something(text):
        raise RowError("empty_prompt", f"The {turn.role} turn is empty.")
    return replace(turn, text=text)


def _check_marks(role: Role, text: str) -> None:
    """Raises: RowError `unsupported_content` for a mark that names no picture of the sample."""
    if "<" not in text:
        return
    for mark in _MARK.findall(text):
        if role != "user" or mark != IMAGE_SLOT:
            raise RowError(
                "unsupported_content",
                f"The {role} turn contains the mark {mark}, which names no picture of the row. In user turns write "
                f"{IMAGE_SLOT} for each picture; other marks are not supported.",
            )
