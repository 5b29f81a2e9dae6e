"""Secrets never reach a record: they are masked by the name of their key and by their own look."""

from __future__ import annotations

import re
from typing import Any

MASK = "***"

_NAMES = r"token|secret|passw(?:or)?d|passphrase|(?:api|access|private|auth)[_-]?key"
_SECRET_NAME = re.compile(rf"(^|[._-])({_NAMES}|credentials?)$", re.I)
_ASSIGNED = re.compile(  # `special_token: …` is why a row was rejected
    rf"((?<![\w.-])(?!special_token:)[\w.-]*(?:{_NAMES})\s*[=:]\s*)([^\s,;&'\"]+)", re.I
)
_URL_USER = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")
_KNOWN = re.compile(
    r"\b(gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}|xox[abprs]-[\w-]{10,}|AKIA\w{12,})"
)
_BEARER = re.compile(r"(bearer\s+)\S+", re.I)


def mask_text(text: str) -> str:
    """A command line, remote address or message without what looks like a secret."""
    text = _URL_USER.sub(rf"\1{MASK}@", text)
    text = _BEARER.sub(rf"\g<1>{MASK}", text)
    text = _KNOWN.sub(MASK, text)
    return _ASSIGNED.sub(rf"\g<1>{MASK}", text)


def mask_tree(value: Any) -> Any:
    """A tree of settings: values of secret-sounding keys and secret-looking texts are masked."""
    if isinstance(value, dict):
        return {key: MASK if _is_secret(key, part) else mask_tree(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(part) for part in value]
    if isinstance(value, str):
        return _KNOWN.sub(MASK, _URL_USER.sub(rf"\1{MASK}@", value))
    return value


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET_NAME.search(str(key)))
