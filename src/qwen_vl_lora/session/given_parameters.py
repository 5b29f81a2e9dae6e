"""Parsing of `--params`: `name=value` pairs separated by commas; a text is taken as typed.

Kedro parses each value as YAML and as a template: it cuts `/data/set #2/c.csv` at the `#`, turns `Question: what?`
into a mapping and `007` into a number, and resolves `${HOME}`. Here a value is
  - a number, true, false or null where it is written as one, as in parameters.yml,
  - a list or mapping where it is enclosed in `[…]` or `{…}`,
  - a text in all other cases, without enclosing quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import click
import yaml

from qwen_vl_lora.runs.masking import remember

_NAME = re.compile(r"\s*([\w.-]+)\s*=\s*")
_NEXT = r"(?=\s*(?:,\s*[\w.-]+\s*=|,?\s*$))"
_ENDS = re.compile(_NEXT)
_QUOTED = re.compile(rf"""(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*"){_NEXT}""", re.DOTALL)
_PLAIN = re.compile(rf".*?{_NEXT}", re.DOTALL)
_SEPARATOR = re.compile(r"\s*,?\s*")

_INTEGER = re.compile(r"[-+]?(?:0|[1-9]\d*)")  # 007 is a text, and so is 2024_01
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?")
_NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_SIMPLE = re.compile(r"[A-Za-z/][\w./@-]*")
_HIDDEN = "\ufdd0{"  # begins with a Unicode noncharacter
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "null": None, "~": None}


def split_params(context: click.Context, _: click.Parameter, value: Any) -> Any:
    """Return the parameters that `--params` gives as a tree. A comma ends a value only where `name=` follows."""
    if not isinstance(value, str):
        return value
    tree: dict[str, Any] = {}
    try:
        for name, given in _settings(value):
            _put(tree, name, given)
    except ValueError as error:
        context.fail(f"--params: {error}")
    remember(tree)
    return tree


def _settings(text: str) -> Iterator[tuple[str, Any]]:
    place = _after(_SEPARATOR, text, 0)
    while place < len(text):
        name = _NAME.match(text, place)
        if name is None:
            raise ValueError(f"{text[place:]!r} must be of the form key=value; several are separated by commas.")
        start = name.end()
        end = _end_of_flow(text, start) or _after(_QUOTED, text, start)
        if end > start:
            yield name[1], _read_yaml(name[1], text[start:end])
        else:
            end = _after(_PLAIN, text, start)
            if text[start : start + 1] in ("'", '"') and end < len(text) and text[start] not in text[start + 1 : end]:
                raise ValueError(f"the quote in {text[place:end]!r} is not closed. Close it, or remove it.")
            yield name[1], _scalar(text[start:end].strip())
        place = _after(_SEPARATOR, text, end)


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


def _end_of_flow(text: str, start: int) -> int:
    """Return the end of a list or mapping if the value ends there too; 0 if there is none."""
    depth, quote = 0, ""
    for place in range(start, len(text) if text[start : start + 1] in ("[", "{") else start):
        character = text[place]
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and text[place - 1] in "[{,: ":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
            if depth == 0:
                return place + 1 if _ENDS.match(text, place + 1) else 0
    return 0


def _read_yaml(name: str, text: str) -> Any:
    try:
        return _FlowLoader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(
            f"the value of {name} cannot be read as a YAML list or mapping ({said}): {text!r}. Quote texts with "
            "brackets, braces or colons."
        ) from error


def _scalar(text: str) -> Any:
    if not text:
        return None
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) or text.lower() in _NOT_FINITE:
        return float(_NOT_FINITE.get(text.lower(), text))
    return text


class _FlowLoader(yaml.SafeLoader):
    """Loads lists and mappings with the same rules for plain values as for single values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as PyYAML declares it


def _construct_scalar(_: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return _scalar(node.value) if node.style is None else node.value


_FlowLoader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *folders, last = name.split(".")
    place = tree
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            break
    if not isinstance(place, dict) or isinstance(place.get(last), dict):
        raise ValueError(f"{name} is given both as a value and as a group of parameters. Give one of the two.")
    place[last] = value


def hide_templates(value: Any) -> Any:
    """Return the parameters with templates hidden from OmegaConf, however often it reads them."""
    return _replace(value, "${", _HIDDEN)


def show_templates(value: Any) -> Any:
    """Undo `hide_templates` anywhere in a tree."""
    return _replace(value, _HIDDEN, "${")


def _replace(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_replace(key, old, new): _replace(part, old, new) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(part, old, new) for part in value]
    return value.replace(old, new) if isinstance(value, str) else value


def params_in_words(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the `name=value` texts from which `split_params` reads the tree again."""
    words = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            words += params_in_words(value, f"{prefix}{key}.")
        else:
            is_plain = isinstance(value, str) and _SIMPLE.fullmatch(value) and value.lower() not in _WORDS
            words.append(f"{prefix}{key}={value if is_plain else json.dumps(value, ensure_ascii=False)}")
    return words
