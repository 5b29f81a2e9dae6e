"""A self-contained HTML page from a template, and what all pages share: pictures, numbers, languages, anchors.

Cards are HTML, not data for the script, so a page works and prints without JavaScript, and the script never parses
a caption. Knows nothing of runs, captions or where pictures are stored.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from qwen_vl_lora.pages.language import ENGLISH, Language, lang

_SHARED = Path(__file__).parent
_QUALITY = 70
_PIXELS = 24_000_000
"""Of all pictures of a page together: about 4 MB as WebP."""
_SMALLEST_SIDE, _LARGEST_SIDE = 224, 800  # px

_NOT_IN_ANCHORS = re.compile(r"[^\w.-]+")
_MINUS = "\u2212"  # as wide as the plus, so columns align


def render_page(folder: Path, name: str, language: Language, **values: Any) -> str:
    """The page of `<folder>/<name>.html`, which extends `page.html`, with `<name>.js` if there is one.

    Templates call `t(key, …)` for a sentence. Everything in `values` is escaped. Only the page's own script may run:
    the policy names its hash.
    """
    script = (_SHARED / "page.js").read_text(encoding="utf-8")
    own_script = folder / f"{name}.js"
    if own_script.is_file():
        script += own_script.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(signed=signed, shown=partial(shown, language=language), lang=partial(_lang_on, language))
    environment.globals.update(t=language.markup, language=language)
    return environment.get_template(f"{name}.html").render(
        style=Markup((_SHARED / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def picture_side(num_pictures: int) -> int:
    """Longest side in px of each of so many pictures, so that the page stays a few MB."""
    return min(_LARGEST_SIDE, max(_SMALLEST_SIDE, math.isqrt(_PIXELS // max(1, num_pictures))))


def picture_data(picture: Image.Image, side: int) -> str:
    """The picture as a data URI, its longest side at most `side` px."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Anchors:
    """Gives each card an id that a link can name: the picture's own where it can be written in one."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def give(self, name: str) -> str:
        """`picture-<name>`, with a number behind it if the name came before."""
        anchor = stem = f"picture-{_NOT_IN_ANCHORS.sub('-', name)}"
        number = 1
        while anchor in self._given:
            number += 1
            anchor = f"{stem}-{number}"
        self._given.add(anchor)
        return anchor


def _lang_on(language: Language, text: str) -> str | None:
    """The tag of a text that is not in the page's language, as far as its characters tell."""
    return lang(text) or (ENGLISH.tag if language.code != "en" else None)


def signed(value: float, digits: int) -> str:
    """The value with its sign; without one if it is shown as 0."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", _MINUS)


def shown(value: Any, language: Language = ENGLISH) -> str:
    """A setting or fact in words."""
    if isinstance(value, bool):
        return language("yes" if value else "no")
    if value is None:
        return language("none")
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(str(item) for item in value)
    if isinstance(value, (str, float)):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def ticks(highest: float, most: int) -> Iterator[float]:
    """0 and the multiples of a round step up to the first at or above `highest`, at most `most + 1` of them."""
    power = 10 ** math.floor(math.log10(highest / most)) if highest > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= highest)
    for number in range(max(1, math.ceil(round(highest / step, 9))) + 1):
        yield round(number * step, 12)
