"""What may be a name: of a recipe, an environment, a run, a version, a pipeline.

Names become parts of paths, and many of them are read from files that somebody else wrote. One pattern for all.
"""

from __future__ import annotations

import re
from typing import Any

from qwen_vl_lora.exceptions import ParameterError

MAX_BYTES = 100
"""Of a name in UTF-8: with what temporary names add, it stays below the 255 bytes of a file name."""

_NAME = re.compile(r"\w[\w.+-]*")


def is_name(value: Any) -> bool:
    """Whether the value is one part of a path that leads nowhere else and hides nothing."""
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        return False
    return len(value.encode("utf-8", "surrogatepass")) <= MAX_BYTES


def check_name(what: str, value: Any) -> str:
    """The value, if it is a name.

    Args:
        what: where the value stands, for the message.

    Raises:
        ParameterError: if it is not one.
    """
    if is_name(value):
        return str(value)
    shown = ascii(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
    raise ParameterError(
        f"{what}: expected a name (letters, digits and _ . + -, beginning with a letter, a digit or _; at most "
        f"{MAX_BYTES} bytes), got {shown}."
    )
