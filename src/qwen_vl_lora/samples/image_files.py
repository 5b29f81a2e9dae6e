"""Image hygiene: whether encoded bytes are a usable picture, and the picture as the model should see it.

Pillow is the only decoder and only for the formats below. Knows nothing of files' names, of
stores or of rows; a fault is a `RowError` with a fixed reason.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# Importing the plugins registers them: otherwise Pillow loads every plugin it has, at the first WebP, in a thread.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.samples.records import RowError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What Pillow may decode. Not EPS (runs Ghostscript), not TIFF (bombs, many codecs), not PDF or SVG."""

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
"""By the format found in the bytes; a file's own name is not believed. MPO is a JPEG with a second view behind it."""

LOOK_SIDE = 8
"""A look compares LOOK_SIDE² cells with their right neighbours, in each colour."""

LOOK_MARGIN = 8
"""Grey levels by which neighbours must differ: noise of re-encoding in flat areas sets no bit."""

LOOK_BYTES = 2 * 3 * LOOK_SIDE**2 // 8

_HEADER_BYTES = 1024
"""What signature and declared size need; as much as is searched for the word that makes a file an SVG."""

_pillow_limit = threading.Lock()

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"%PDF", "PDF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\x1aE\xdf\xa3", "a video (Matroska)"),
    *((b"P%d" % kind + blank, "a portable anymap") for kind in range(1, 8) for blank in (b"\n", b" ", b"\r", b"\t")),
)

_STILL_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"avis", b"hevc", b"msf1")

_TURNS_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of a picture after it was decoded once.

    Attributes:
        width, height: pixels, after the EXIF orientation was applied.
        suffix: with its dot, by the format of the bytes.
        look: difference hash of LOOK_BYTES; pictures that look alike differ in few bits.
    """

    width: int
    height: int
    suffix: str
    look: bytes


def inspect_image(data: bytes, limits: ImageParameters) -> ImageFacts:
    """Decode a picture once, whole, and return its facts.

    Raises:
        RowError: with the reason, when the bytes are no picture that may be used.
    """
    _check_header(data, limits)
    image = _open(io.BytesIO(data), limits.max_source_pixels)
    try:
        _check_size(image.size, limits)
        _reject_animation(image)
        if image.format == "PNG":
            image.verify()  # checksums, which decoding skips; Pillow wants the file opened anew afterwards
            image = _open(io.BytesIO(data), limits.max_source_pixels)
        image_size = image.size
        image.load()
        orientation = _orientation(image)
        suffix = SUFFIXES[image.format or ""]
        upright = _flatten(_turn_upright(image, orientation))
    except (RowError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers raise whatever a malformed byte leads to
        raise _damaged(error) from error
    width, height = reversed(image_size) if orientation >= 5 else image_size
    return ImageFacts(width=width, height=height, suffix=suffix, look=_look(upright))


def measure_image(file: IO[bytes], limits: ImageParameters) -> tuple[int, int]:
    """Width and height as the header has them. Nothing is decoded, so what lies behind it may be damaged.

    Raises:
        RowError: with the reason, when the header alone tells that the picture may not be used.
        OSError: when the file cannot be read.
    """
    _check_header(file.read(_HEADER_BYTES), limits)
    with _open(file, limits.max_source_pixels) as image:
        _check_size(image.size, limits)
        return image.size


def open_image(source: bytes | Path, max_pixels: int = 0) -> Image.Image:
    """Return the picture as the model should see it: upright, RGB, transparent parts white.

    16-bit greys are scaled to 8 bits. Of an animation, which `inspect_image` rejects, the first frame.

    Args:
        source: the encoded bytes, or the file that holds them.
        max_pixels: what it is known to have; by itself Pillow refuses what it takes for a bomb.

    Raises:
        RowError: when the bytes cannot be decoded.
        OSError: when `source` is a path that cannot be read.
    """
    image = _open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()), max_pixels)
    try:
        image.load()
        return _flatten(_turn_upright(image, _orientation(image)))
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(error) from error


def _open(file: IO[bytes], max_pixels: int) -> Image.Image:
    """Read a picture's header; what it says of the size is for the caller to judge, before he decodes."""
    try:
        with _pillow_takes(max_pixels):
            return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("too_many_pixels", f"{error} See image.max_source_pixels.") from error
    except MemoryError:
        raise
    except Exception as error:
        raise _damaged(error) from error


@contextlib.contextmanager
def _pillow_takes(max_pixels: int) -> Iterator[None]:
    """Let Pillow open pictures up to a size, while one header is read: its own limit is of the whole process.

    One thread at a time, as another would take the raised limit for Pillow's own and put it back for good.
    Never below Pillow's own: `_check_size` is stricter, and others in the process may be opening pictures.
    """
    with _pillow_limit:
        own = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own


def _damaged(error: Exception) -> RowError:
    said = " ".join(str(error).split())
    if "<_io." in said:  # "cannot identify image file <_io.BytesIO object at 0x…>" helps nobody
        said = "its header is not valid"
    return RowError("damaged_image", f"The image cannot be decoded to its end: {said or type(error).__name__}.")


def _check_header(data: bytes, limits: ImageParameters) -> None:
    """Check what needs no decoder: the signature, and the declared size where it stands at a fixed place."""
    if not data:
        raise RowError("empty_file", "The image has no bytes.")
    found = _signature(data)
    if found is None:
        start = ascii(data[:16].decode("latin-1"))
        raise RowError("not_an_image", f"The bytes are no image of a known format; they begin with {start}.")
    if found not in FORMATS:
        raise RowError("unsupported_format", f"The image is {found}; allowed are {', '.join(FORMATS)}.")
    size = _declared_size(data, found)
    if size is not None:
        _check_size(size, limits)


def _signature(data: bytes) -> str | None:
    for start, name in _SIGNATURES:
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "a video (AVI)"
    if data[4:8] == b"ftyp":
        return "HEIC or AVIF" if data[8:12] in _STILL_BRANDS else "a video (MP4 or MOV)"
    if b"<svg" in data[:1024].lower():
        return "SVG"
    return None


def _declared_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Width and height from the header; None for JPEG, whose size stands anywhere, and for short files.

    Needed before Pillow opens the file: it refuses a size of 0 without saying so, and its WebP
    decoder reserves the canvas when the file is opened.
    """
    try:
        if name == "PNG":
            return struct.unpack_from(">II", data, 16)
        if name == "GIF":
            return struct.unpack_from("<HH", data, 6)
        if name == "WEBP":
            return _declared_webp_size(data)
    except struct.error:
        return None
    return None


def _declared_webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (high_width << 16 | low_width) + 1, (high_height << 16 | low_height) + 1
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _check_size(size: tuple[int, int], limits: ImageParameters) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise RowError("zero_size_image", f"The image is {width}x{height} pixels.")
    if width * height > limits.max_source_pixels:
        raise RowError(
            "too_many_pixels",
            f"The image has {width}x{height} pixels; image.max_source_pixels allows {limits.max_source_pixels}.",
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise RowError(
            "extreme_aspect_ratio",
            f"The image is {width}x{height} pixels; image.max_aspect_ratio allows {limits.max_aspect_ratio:g} to 1.",
        )


def _reject_animation(image: Image.Image) -> None:
    """A caption of an animation need not fit its first frame, which is often blank."""
    if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        raise RowError("animated_image", "The image is an animation. Store the frame that its caption describes.")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) when absent or out of range."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _TURNS_BY_ORIENTATION else 1


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS_BY_ORIENTATION.get(orientation)
    if turn is None:
        return image
    upright = image.transpose(turn)
    upright.info = image.info  # names the transparent colour
    return upright


def _flatten(image: Image.Image) -> Image.Image:
    """RGB of any mode that the allowed formats give."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _to_8_bit_grey(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 0…65535 to 0…255, where Pillow's own conversion may clip; a transparent grey becomes alpha."""
    import numpy as np

    values = np.asarray(image).astype(np.uint32).clip(0, 65535)
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _look(image: Image.Image) -> bytes:
    """Difference hash in colour: bits for cells much brighter, then for cells much darker than their right neighbour.

    Grey alone takes flat drawings that differ in colour for copies of each other.
    """
    import numpy as np

    # reducing_gap: whole pixels are averaged first, which takes a third off the time and moves no bit that matters.
    small = image.resize((LOOK_SIDE + 1, LOOK_SIDE), Image.Resampling.BOX, reducing_gap=4.0)
    cells = np.asarray(small, dtype=np.int16)
    steps = cells[:, :-1] - cells[:, 1:]
    bits = np.stack([steps > LOOK_MARGIN, steps < -LOOK_MARGIN])
    return np.packbits(bits).tobytes()
