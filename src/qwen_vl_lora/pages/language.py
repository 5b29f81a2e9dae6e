"""The language of pages, cards and the terminal's summary: English or Simplified Chinese.

`sentences/*.toml` hold each sentence in both languages. `{count:picture|pictures}` is a number with its noun:
`1 picture`, `2 pictures`. Sentences of pages may contain HTML; what is put into them is escaped.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

Code = Literal["en", "zh"]
Setting = Literal["auto", "en", "zh"]

SENTENCES = Path(__file__).parent / "sentences"
TAGS: Mapping[Code, str] = {"en": "en", "zh": "zh-CN"}
_READ_CAPTIONS = 1000
_KANA, _HANGUL, _HAN = re.compile("[\u3040-\u30ff]"), re.compile("[\uac00-\ud7af]"), re.compile("[\u3400-\u9fff]")
_PAGE_TAG = re.compile(r'<html lang="([\w-]+)">')


class _Count(int):
    """A number that its noun may follow: the format `picture|pictures` adds the one that fits."""

    def __format__(self, nouns: str) -> str:
        one, either, many = nouns.partition("|")
        return f"{int(self)} {one if self == 1 else many}" if either else int.__format__(self, nouns)


class Language:
    """The sentences of one language: `language(key, name=value)` is a text, `language.markup(…)` a piece of HTML.

    Args:
        code: `en` or `zh`.
        setting: the `report.language` behind it.
    """

    def __init__(self, code: Code, setting: Setting) -> None:
        self.code: Code = code
        self.setting = setting
        self.tag = TAGS[code]

    def __call__(self, key: str, /, **values: Any) -> str:
        return _sentences()[key][self.code].format(**_counted(values))

    def markup(self, key: str, /, **values: Any) -> Markup:
        """The sentence as HTML; values are escaped."""
        return Markup(_sentences()[key][self.code]).format(**_counted(values))

    def join(self, texts: Iterable[str]) -> str:
        """A list of words: `a, b`."""
        return self("comma").join(texts)

    def clauses(self, texts: Iterable[str]) -> str:
        """A list of clauses: `a; b`."""
        return self("semicolon").join(texts)

    def prose(self, sentences: Iterable[str]) -> str:
        """Sentences after one another."""
        return self("between_sentences").join(sentences)

    def date(self, iso: str) -> str:
        """The day of an ISO 8601 time; the text itself where it is none."""
        try:
            day = dt.date.fromisoformat(iso[:10])
        except ValueError:
            return iso[:10]
        return self("date", iso=day.isoformat(), year=day.year, month=day.month, day=day.day)

    def duration(self, seconds: float) -> str:
        """Hours and minutes, minutes and seconds, or seconds."""
        minutes, rest = divmod(round(seconds), 60)
        if minutes >= 60:
            return self("hours", hours=minutes // 60, minutes=minutes % 60)
        return self("minutes", minutes=minutes, seconds=rest) if minutes else self("seconds", seconds=rest)


ENGLISH, CHINESE = Language("en", "en"), Language("zh", "zh")


def choose_language(setting: Setting, captions: Iterable[str]) -> Language:
    """The language that `report.language` asks for.

    `auto` is Chinese if at least half of the first 1,000 captions are: whoever reads the page reads them too. The
    terminal's locale does not count, so the same run gives the same page on every machine.
    """
    if setting != "auto":
        return Language(setting, setting)
    tags = [lang(text) for text in islice(captions, _READ_CAPTIONS)]
    return Language("zh" if tags and 2 * tags.count("zh") >= len(tags) else "en", setting)


def language_of_page(html: str) -> Language:
    """The language that a page states in its `lang` attribute."""
    found = _PAGE_TAG.search(html)
    return next((Language(code, code) for code, tag in TAGS.items() if found and found[1] == tag), ENGLISH)


def lang(text: str) -> str | None:
    """The language tag of a text in Chinese, Japanese or Korean characters, for screen readers; None for others."""
    found = ((_KANA, "ja"), (_HANGUL, "ko"), (_HAN, "zh"))
    return next((tag for pattern, tag in found if pattern.search(text)), None)


@functools.cache
def _sentences() -> dict[str, dict[str, str]]:
    """Key → language → sentence, of all files."""
    files = [tomllib.loads(file.read_text(encoding="utf-8")) for file in sorted(SENTENCES.glob("*.toml"))]
    return {key: texts for file in files for key, texts in file.items()}


def _counted(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _Count(value) if type(value) is int else value for name, value in values.items()}
