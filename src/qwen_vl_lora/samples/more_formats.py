"""AVIF, HEIC and TIFF: formats that are decoded only if `image.more_formats` names them.

Their decoders are loaded at the first picture. Size limits are checked elsewhere, as for any other format.
"""

from __future__ import annotations

from typing import IO

from PIL import Image

from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.signatures import way_to_convert

MORE_FORMATS = ("AVIF", "HEIC", "TIFF")

_TIFF_CODECS = ("raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_TIFF_MODES = {"L": (0, 1), "I;16": (1,), "I;16B": (1,), "RGB": (2,), "RGBA": (2,)}
"""Pillow's mode, and the photometric interpretations that it reads correctly: it does not invert 16-bit greys."""


def open_more(file: IO[bytes], kind: str | None) -> Image.Image:
    """Read the header of a picture in one of these formats.

    Raises:
        RowError: `unsupported_format` when its decoder is not installed.
    """
    if kind != "HEIC":
        name = str(kind)
        from PIL import AvifImagePlugin, TiffImagePlugin

        if name == "AVIF" and not AvifImagePlugin.SUPPORTED:
            raise RowError("unsupported_format", f"This Pillow was built without AVIF. {way_to_convert(name)}")
        assert TiffImagePlugin  # importing it registers the format
        return Image.open(file, formats=(name,))
    try:
        from pillow_heif import HeifImageFile  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RowError(
            "unsupported_format",
            "HEIC is read by pillow-heif, which is not installed: pip install -e '.[heif]'. Or "
            f"{way_to_convert('HEIC')[0].lower()}{way_to_convert('HEIC')[1:]}",
        ) from error
    opened: Image.Image = HeifImageFile(file)
    return opened


def check_more(image: Image.Image) -> None:
    """Accept a single picture of a supported kind; other formats are not checked.

    Raises:
        RowError: `several_pictures` or `unsupported_format`.
    """
    if image.format not in ("AVIF", "HEIF", "TIFF"):
        return
    if image.format == "TIFF":
        _check_tiff(image)
    elif getattr(image, "n_frames", 1) > 1:
        _reject_several(image)


def _check_tiff(image: Image.Image) -> None:
    tags: dict[int, object] = getattr(image, "tag_v2", {})
    codec = image.info.get("compression", "raw")
    bits = tags.get(_BITS, (1,))
    depths = sorted(set(bits if isinstance(bits, tuple) else (bits,)))
    expected = [16] if image.mode.startswith("I;16") else [8]
    formats = tags.get(_SAMPLE_FORMAT, (1,))
    is_usual = (
        codec in _TIFF_CODECS
        and depths == expected
        and tags.get(_PHOTOMETRIC, 1) in _TIFF_MODES.get(image.mode, ())
        and set(formats if isinstance(formats, tuple) else (formats,)) == {1}
    )
    if not is_usual:
        raise RowError(
            "unsupported_format",
            f"The TIFF has mode {image.mode}, {'/'.join(map(str, depths))} bits, codec {codec}; supported are grey of "
            f"8 or 16 bits, RGB and RGBA of 8 bits, with the codecs {', '.join(_TIFF_CODECS)}. "
            f"{way_to_convert('TIFF')}",
        )
    try:
        image.seek(1)  # counting pages is avoided: a file can have millions
    except EOFError:
        image.seek(0)
        return
    _reject_several(image)


def _reject_several(image: Image.Image) -> None:
    raise RowError(
        "several_pictures",
        f"The {image.format} file has several pictures or pages. Store the one that its caption describes.",
    )
