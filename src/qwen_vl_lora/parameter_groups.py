"""The base class of all blocks of settings, and the nearest known name for a mistyped one."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ConfigDict


class ParameterGroup(BaseModel):
    """One block of parameters.yml. Unknown keys are errors and values keep their YAML type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def nearest(name: str, known: set[str] | frozenset[str]) -> str:
    """`; nearest: …` for an error message, or nothing when no known name is close."""
    if name == "rank" and "r" in known:  # PEFT's own one-letter name is too short for edit distance
        return "; nearest: r"
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; nearest: {close[0]}" if close else ""
