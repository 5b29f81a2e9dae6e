"""Keeps secrets out of records, messages and logs.

A secret is recognised by its place (the user of a URL, a signature in its query, a value beside a name such as
`password` or `api_key`), by its form (`hf_…`, `ms-…`, a JSON web token), or because this process received it: values
of such names in the environment and on the command line are masked wherever they occur later.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MASK = "***"

_SECRET = (
    r"token|secret|passw(?:or)?d|(?<=[._;-])pwd|passphrase|passcode|credentials?|authorization|cookie|"
    r"(?:api|access|private|auth|account|signing|encryption|secret|session)[_.-]?key(?:[_.-]?id)?|"
    r"shared[_.-]?access[_.-]?signature"
)
# These are tokens of a text, not of a user.
_OF_A_TEXT = r"(?:special|pad|eos|bos|unk|sep|cls|mask|image|video|vision|audio|start|end|stop|next)[_-]?token"
_NAME = rf"(?<![\w.-])(?![\w.-]*{_OF_A_TEXT}\b)[\w.-]*(?:{_SECRET})"
_IS_SECRET = re.compile(rf"(?:^|[._-])(?:{_SECRET}|auth|pass)$", re.I)
_IS_OF_A_TEXT = re.compile(rf"{_OF_A_TEXT}$", re.I)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_NO_VALUE = r"(?![\"']?(?:none|null|true|false|\*\*\*)(?![\w.-]))"
_QUOTED = r"""(?P<quote>\\?["'])(?:(?!(?P=quote))(?:\\.|.))*(?P=quote)"""
_NEXT_NAME = r"[,;&]\s*[\w.-]+\s*[=:]"
_BARE = rf"""(?:(?!{_NEXT_NAME})[^\s"'])+?(?=[,;.)\]}}]*(?:["'\s]|$)|{_NEXT_NAME})"""
_ASSIGNED = re.compile(rf"""(?P<before>{_NAME}\\?["']?\s*=\s*){_NO_VALUE}(?:{_QUOTED}|{_BARE})""", re.I)
_BESIDE_COLON = re.compile(rf"""(?P<before>{_NAME}\\?["']?\s*:\s*){_NO_VALUE}(?:{_QUOTED}|(?P<bare>{_BARE}))""", re.I)
_OPTION = re.compile(rf"(?P<before>(?<!\S)--?[\w-]*(?:{_SECRET})\s+)(?!-){_NO_VALUE}(?:{_QUOTED}|\S+)", re.I)
_ARGUMENT = re.compile(
    rf"(?P<before>(?:^|,)\s*-*{_NAME}\s*=\s*)(?:{_QUOTED}(?=\s*(?:,|$))|(?:(?!,\s*[\w.-]+\s*=).)+)", re.I | re.S
)
_AUTHORIZATION = re.compile(r"""(?P<before>\bauthorization\\?["']?\s*[:=]\s*\\?["']?(?:\w+\s+)?)[^\s"',;\\]+""", re.I)
_SCHEME = re.compile(r"\b(?P<before>(?P<scheme>basic|bearer)\s+)(?P<value>[\w.~+/-]+=*)", re.I)

# A password extends to the last @, even if it contains an @ or (wrongly) a slash. `host:8080/` is not a password, and
# a URL that was parsed as a file path has lost a slash.
_PASSWORD = r"[^\s/?#@:\[]*:(?!\d*(?:[/?#,;)\s]|$))"
_URL_USER = re.compile(
    r"(?P<before>\b(?:[a-z][a-z0-9+.-]{1,20}://|(?:https?|ftps?|ssh|git|s3|gs|oss):/(?!/)))"
    rf"(?P<user>{_PASSWORD}(?:(?!:/)[^\s\"'<>])+|{_PASSWORD}(?=\S)[^\n/?#\"'<>]{{1,100}}|[^\s/?#]*)@(?=[\w\[*])",
    re.I,
)
_QUERY_NAME = (
    r"(?:[\w.%-]*[_.-])?(?:sig|key|auth|credential|[a-z]*signature|[a-z]*token|[a-z]*secret|"
    r"passw(?:or)?d|pwd|[a-z]*(?:api|access)key(?:id)?)="
)
# After a semicolon it may be a connection string, in which # ends nothing.
_QUERY = re.compile(
    rf"(?P<before>[?&]{_QUERY_NAME})[^&\s#\"'<>]+|(?P<behind>;{_QUERY_NAME})[^&;\s\"'<>]+",
    re.I,
)
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|"
    r"ms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|ms-[A-Za-z0-9]{16,}|"
    r"sk-(?:(?:proj|ant|svcacct|admin|or|lf)-[\w-]{12,}|[A-Za-z0-9]{16,})|xox[abeprs]-[\w-]{10,}|"
    r"(?:AKIA|ASIA|LTAI)[A-Za-z0-9]{12,}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{20,}|pypi-[\w-]{30,}|"
    r"eyJ[\w-]{5,}\.[\w-]{5,}(?:\.[\w-]+){0,3}"
    r")"
)
_PRIVATE_KEY = re.compile(r"(?P<before>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.S)

_LOOKS_SECRET = re.compile(r"[\d_=/+]")
_AFTER_A_VALUE = re.compile(r"""[)\]}.\\"']*\s*(?:[,;&}\n]|\Z)""")
_SHORTEST = 8
_remembered: set[str] = set()


def remember(settings: Mapping[str, Any], texts: Iterable[str] = ()) -> None:
    """Remember secrets that this process received, to mask them wherever they occur.

    Short plain words are left out: `kitchen` may be a password, but also occurs in captions.

    Args:
        settings: environment variables, or the tree of `--params`; values with a secret-sounding name count.
        texts: arguments; passwords in their URLs count.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping):
            remember(value)
            continue
        given = [str(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
        if _names_a_secret(name):
            _remembered.update(filter(_is_telling, given))
        texts = [*texts, *given]
    passwords = (found["user"].partition(":")[2] for text in texts for found in _URL_USER.finditer(text))
    _remembered.update(filter(_is_telling, passwords))


def _is_telling(secret: str) -> bool:
    kinds = [str.islower, str.isupper, str.isdigit, lambda character: not character.isalnum()]
    is_varied = sum(any(map(kind, secret)) for kind in kinds) > 1
    is_path = secret.startswith(("/", "~", "./", "../"))  # CREDENTIALS=/home/me/key.json
    return len(secret) >= _SHORTEST and is_varied and not is_path


def mask_text(text: str) -> str:
    """Mask everything in a message, URL or traceback that is a secret or looks like one."""
    for secret in sorted(_remembered, key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _PRIVATE_KEY.sub(rf"\g<before>{MASK}", text)
    text = _URL_USER.sub(rf"\g<before>{MASK}@", text)
    text = _QUERY.sub(lambda found: f"{found['before'] or found['behind']}{MASK}", text)
    text = _KNOWN.sub(MASK, text)
    text = _AUTHORIZATION.sub(rf"\g<before>{MASK}", text)
    text = _SCHEME.sub(_mask_scheme, text)
    text = _OPTION.sub(_mask_value, text)
    text = _ASSIGNED.sub(_mask_value, text)
    return _BESIDE_COLON.sub(_mask_beside_colon, text)


def mask_command(arguments: Sequence[str]) -> list[str]:
    """Mask the arguments of a command line. A blank does not end a secret; an option's secret is the next argument."""
    masked = [mask_text(_ARGUMENT.sub(_mask_value, argument)) for argument in arguments]
    for number, option in enumerate(arguments[:-1]):
        if option.startswith("-") and "=" not in option and _names_a_secret(option):
            masked[number + 1] = MASK
    return masked


def mask_tree(value: Any) -> Any:
    """Mask values of secret-sounding keys and secret-looking texts in a tree."""
    if isinstance(value, dict):
        masked = {key: _mask_all(part) if _names_a_secret(key) else mask_tree(part) for key, part in value.items()}
        return {mask_text(key) if isinstance(key, str) else key: part for key, part in masked.items()}
    if isinstance(value, (list, tuple)):
        return [mask_tree(part) for part in value]
    return mask_text(value) if isinstance(value, str) else value


def _mask_all(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mask_all(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask_all(part) for part in value]
    return value if isinstance(value, bool) or value in (None, "") else MASK


def _names_a_secret(name: Any) -> bool:
    words = _CAMEL.sub("_", str(name))
    return bool(_IS_SECRET.search(words)) and not _IS_OF_A_TEXT.search(words)


def _mask_value(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    return f"{found['before']}{quote}{MASK}{quote}"


def _mask_beside_colon(found: re.Match[str]) -> str:
    """Whether a line of a file holds a secret: `password: sword` does; `hub_token: the project owns it` does not."""
    if found["bare"] is None or _LOOKS_SECRET.search(found["bare"]):
        return _mask_value(found)
    line = found.string[max(0, found.start() - 40) : found.start()].rstrip(" \t")
    is_key = "_" in found["before"] or "." in found["before"] or line[-1:] in ("", *",;&{([\"'\n-")
    return _mask_value(found) if is_key and _AFTER_A_VALUE.match(found.string, found.end()) else found[0]


def _mask_scheme(found: re.Match[str]) -> str:
    """Whether this is a credential as in `Basic dXNlcjpwYXNz` or `Bearer x1y2…`, and not a plain word."""
    value = found["value"]
    if found["scheme"].lower() == "basic":
        try:
            is_secret = b":" in base64.b64decode(value + "=" * (-len(value) % 4))
        except (binascii.Error, ValueError):
            is_secret = False
    else:
        is_secret = len(value) >= _SHORTEST and bool(re.search(r"[\d_~+/=]|\w\.\w|[a-z][A-Z]", value))
    return f"{found['before']}{MASK}" if is_secret else found[0]
