"""The command that started this process, as records and messages show it: without secrets."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from qwen_vl_lora.runs.masking import mask_command

_PROGRAMS = ("kedro", "qwen-vl-lora")
_ENVIRONMENT = ("--env", "-e")


def given_command() -> str:
    """Return the command line, quoted for a shell."""
    return shlex.join(mask_command([Path(sys.argv[0]).name, *sys.argv[1:]]))


def repeated(params: Mapping[str, str], env: str | None = None) -> str:
    """Return the given command with the parameters that it lacks and, if `env` is given, with this environment.

    Code that is no command of this project, such as a notebook, gets the options alone.
    """
    program, options = _program(), mask_command(sys.argv[1:])
    if not program:
        options = []
    if env is not None:
        options = [*_without(options, _ENVIRONMENT)[0], "--env", env]
    options, given = _without(options, ("--params",))
    lacking = [f"{key}={value}" for key, value in params.items() if not any(_gives(text, key) for text in given)]
    return shlex.join([*program, *options, "--params", ",".join([*given, *lacking])])


def _gives(params: str, key: str) -> bool:
    return re.search(rf"(^|,)\s*{re.escape(key)}\s*=", params) is not None


def _program() -> list[str]:
    path = Path(sys.argv[0])
    if path.name == "__main__.py" and path.parent.name.replace("_", "-") in _PROGRAMS:
        return ["python", "-m", path.parent.name]
    return [path.name] if path.name in _PROGRAMS else []


def _without(options: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the options without those of these names, and their values."""
    kept, values = [], []
    rest = iter(options)
    for option in rest:
        name, is_joined, value = option.partition("=")
        if name not in names:
            kept.append(option)
        else:
            values.append(value if is_joined else next(rest, ""))
    return kept, values
