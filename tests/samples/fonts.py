"""A font that refuses what Raqm refuses, so that machines without Raqm or a font of the system check the same."""

from __future__ import annotations

import unicodedata
from io import BytesIO

from PIL import ImageFont


class StrictFont(ImageFont.FreeTypeFont):
    """Pillow's own font; lays out no line break, control or lone surrogate, in whatever function it is given one."""

    def __init__(self, size: int) -> None:
        plain = ImageFont.load_default(size)
        assert isinstance(plain, ImageFont.FreeTypeFont)
        super().__init__(BytesIO(plain.font_bytes), size)

    def getlength(self, text, *args, **kwargs):
        _refuse(text)
        return super().getlength(text, *args, **kwargs)

    def getmask2(self, text, *args, **kwargs):
        _refuse(text)
        return super().getmask2(text, *args, **kwargs)

    def getbbox(self, text, *args, **kwargs):
        _refuse(text)
        return super().getbbox(text, *args, **kwargs)


def _refuse(text: str) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text):
        raise RuntimeError("raqm_layout() failed.")
