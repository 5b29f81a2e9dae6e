"""The turns of a sample: their order, their texts and their image slots, checked and cleaned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from qwen_vl_lora.samples.records import IMAGE_SLOT, Role, RowError, Turn
from qwen_vl_lora.samples.texts import clean_text, printable, says_something

ROLES: tuple[Role, ...] = get_args(Role)


def clean_turns(turns: Sequence[Turn], num_images: int, collapse_whitespace: bool) -> tuple[Turn, ...]:
    """Return the turns of one sample with clean texts.

    A user turn that is nothing but the sample's one image says nothing itself: it is dropped, which
    makes the sample a caption.

    Raises:
        RowError: when a text, the order of the turns or the number of image slots is wrong.
    """
    check_order([turn.role for turn in turns])
    cleaned = _drop_bare_image(tuple(_clean_turn(turn, collapse_whitespace) for turn in turns))
    num_slots = sum(turn.text.count(IMAGE_SLOT) for turn in cleaned if turn.role == "user")
    if has_question(cleaned) and num_slots != num_images:
        raise RowError(
            "placeholder_mismatch",
            f"The user turns hold {num_slots} {IMAGE_SLOT} for {num_images} images; make the two numbers equal.",
        )
    if not has_question(cleaned) and num_images != 1:
        raise RowError(
            "placeholder_mismatch",
            f"An answer without a user turn is a caption of one image; came {num_images} images.",
        )
    return cleaned


def has_question(turns: Sequence[Turn]) -> bool:
    """Whether a sample asks something itself; without a user turn it is a caption and `prompt` asks."""
    return any(turn.role == "user" for turn in turns)


def check_order(roles: Sequence[str]) -> None:
    """Allow `[system] (user assistant)+`, and `[system] assistant` for a caption.

    Raises:
        RowError: `wrong_roles`, `no_answer` or `odd_turns`.
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise RowError("wrong_roles", f"The role {printable(repr(unknown[0]))} is none of {', '.join(ROLES)}.")
    if "assistant" not in roles:
        raise RowError("no_answer", "There is no assistant turn, so there is nothing to learn.")
    spoken = list(roles[1:] if roles[0] == "system" else roles)
    if spoken == ["assistant"]:
        return
    if len(spoken) % 2:
        raise RowError("odd_turns", f"There are {len(spoken)} turns; each user turn needs its assistant turn.")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError("wrong_roles", f"After an optional system turn, user and assistant alternate; came {spoken}.")


def _drop_bare_image(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    questions = [turn.text.strip() for turn in turns if turn.role == "user"]
    return tuple(turn for turn in turns if turn.role != "user") if questions == [IMAGE_SLOT] else turns


def _clean_turn(turn: Turn, collapse_whitespace: bool) -> Turn:
    text = clean_text(turn.text, collapse_whitespace)
    if turn.role == "assistant" and (not says_something(text) or text.strip().casefold() == "nan"):
        raise RowError("empty_caption", f"The answer is {printable(repr(turn.text))}: nothing to learn.")
    if turn.role != "assistant" and not says_something(text):
        raise RowError("empty_prompt", f"The {turn.role} turn is empty.")
    return Turn(turn.role, text)
