"""Checks whether encoded bytes are a usable picture, and decodes a picture for the model.

Pillow is the only decoder, and only for the formats below. This module knows nothing of file names,
stores or rows; a fault is a `RowError` with a fixed reason.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

# Importing the plugins registers them. Otherwise Pillow loads all of its plugins at the first WebP, in a thread.
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
from qwen_vl_lora.samples.more_formats import MORE_FORMATS, check_more, open_more
from qwen_vl_lora.samples.records import RowError
from qwen_vl_lora.samples.signatures import declared_size, signature, way_to_convert

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that are always decoded. Not EPS (runs Ghostscript), PDF or SVG; AVIF, HEIC and TIFF only if
`image.more_formats` names them: each adds a decoder in C that reads untrusted bytes and takes 0.1 s to load."""

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
SUFFIXES |= {"AVIF": ".avif", "HEIF": ".heic", "TIFF": ".tif"}
"""Suffix by the format of the bytes; file names are not trusted. MPO is a JPEG followed by a second view."""

DECODING = 2
"""Increase it when the same bytes give other pixels: stored results are then computed again."""

LOOK_SIDE = 8
"""A difference hash compares LOOK_SIDE² cells with their right neighbours, in each colour."""

_LOOK_PIXELS = 64
"""Least width and height from which a difference hash is computed. A JPEG is decoded no larger than needed for it."""

LOOK_VERSION = 2
"""Increase it when the same pixels give another difference hash."""

LOOK_MARGIN = 8
"""Grey levels by which neighbours must differ, so that re-encoding noise in flat areas sets no bit."""

PLAIN_MARGIN = 3
"""Levels (of 256) between the darkest and the brightest pixel of a picture of one colour."""

LOOK_BYTES = 2 * 3 * LOOK_SIDE**2 // 8

_HEADER_BYTES = 1024
"""Bytes needed for the signature and the declared size, and searched for the tag of an SVG."""

_Ranges = tuple[tuple[int, int], ...]

_USUAL_BITS = (8, 10, 12, 14)
"""Bit depths of cameras and scanners that store greys unscaled in 16 bits; 16 is the nominal depth."""

_pillow_limit = threading.Lock()

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
    """Facts about a picture after decoding it once.

    Attributes:
        width, height: pixels, after the EXIF orientation was applied.
        suffix: with the dot, by the format of the bytes.
        look: difference hash of LOOK_BYTES; similar pictures differ in few bits.
        is_plain: whether all pixels have nearly one colour.
    """

    width: int
    height: int
    suffix: str
    look: bytes
    is_plain: bool


def inspect_image(data: bytes, limits: ImageParameters) -> ImageFacts:
    """Decode a picture completely and return its facts.

    Raises:
        RowError: with the reason, when the bytes are not a usable picture.
    """
    _check_header(data, limits)
    image = _open(io.BytesIO(data), limits.max_source_pixels)
    try:
        _check_size(image.size, limits)
        _reject_animation(image)
        check_more(image)
        if image.format == "PNG":
            image.verify()  # checksums, which decoding skips; Pillow must open the file again afterwards
            image = _open(io.BytesIO(data), limits.max_source_pixels)
        image_size = image.size
        scale = _scale_for_look(image_size)
        if image.format == "JPEG":
            image.draft(image.mode, (_LOOK_PIXELS, _LOOK_PIXELS))  # reads all bytes, computes the scaled pixels only
        image.load()
        orientation = _orientation(image)
        suffix = SUFFIXES[image.format or ""]
        upright = _flatten(_turn_upright(_scale_deep_colours(image, data), orientation))
    except (RowError, MemoryError):
        raise
    except Exception as error:  # Pillow's parsers can raise anything for malformed bytes
        raise _damaged(error) from error
    width, height = reversed(image_size) if orientation >= 5 else image_size
    reduced = upright.reduce(scale) if scale > 1 and image.size == image_size else upright
    # Weighted cells: those of BOX move by whole pixels, so copies of another size would look different.
    extent = (0, 0, width / scale, height / scale)  # the last pixels of a reduced picture may stand for fewer
    small = reduced.resize((LOOK_SIDE + 1, LOOK_SIDE), Image.Resampling.BILINEAR, box=extent)
    is_plain = _is_plain(small) and _is_plain(upright)  # averages lie between the extremes, and are few
    if is_plain and image.size != image_size:  # of averages, too
        is_plain = _is_plain(open_image(data, limits.max_source_pixels))
    return ImageFacts(width=width, height=height, suffix=suffix, look=_look(small), is_plain=is_plain)


def _scale_for_look(size: tuple[int, int]) -> int:
    """How many pixels of a side become one, before the cells of a look are averaged: as libjpeg scales."""
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or min(size) // _LOOK_PIXELS >= scale)


def measure_image(file: IO[bytes], limits: ImageParameters) -> tuple[int, int]:
    """Return width and height from the header. Nothing is decoded, so the rest may be damaged.

    Raises:
        RowError: with the reason, when the header shows that the picture is not usable.
        OSError: when the file cannot be read.
    """
    _check_header(file.read(_HEADER_BYTES), limits)
    with _open(file, limits.max_source_pixels) as image:
        _check_size(image.size, limits)
        return image.size


def open_image(source: bytes | Path, max_pixels: int = 0) -> Image.Image:
    """Return the picture for the model: upright, RGB, transparent parts white.

    If every pixel is transparent, alpha is ignored. 16-bit greys are scaled to 8 bits, from the 8 to 14 bits
    that they use if the others are empty. An animation, which `inspect_image` rejects, gives its first frame.

    Args:
        source: the encoded bytes, or the file that contains them.
        max_pixels: the known number of pixels; without it Pillow refuses suspected decompression bombs.

    Raises:
        RowError: when the bytes cannot be decoded.
        OSError: when `source` is a path that cannot be read.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    image = _open(io.BytesIO(data), max_pixels)
    try:
        image.load()
        return _flatten(_turn_upright(_scale_deep_colours(image, data), _orientation(image)))
    except (MemoryError, RowError):
        raise
    except Exception as error:
        raise _damaged(error) from error


def _open(file: IO[bytes], max_pixels: int) -> Image.Image:
    """Read the header of a picture. The caller must check the declared size before decoding."""
    try:
        file.seek(0)
        start = file.read(_HEADER_BYTES)
        file.seek(0)
        with _pillow_takes(max_pixels):
            found = signature(start)
            return open_more(file, found) if found in MORE_FORMATS else Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError("too_many_pixels", f"{error} See image.max_source_pixels.") from error
    except (MemoryError, RowError):
        raise
    except Exception as error:
        raise _damaged(error) from error


@contextlib.contextmanager
def _pillow_takes(max_pixels: int) -> Iterator[None]:
    """Let Pillow open pictures up to a size while one header is read. Its limit applies to the whole process.

    One thread at a time: another thread would save the raised limit as Pillow's own and restore it for good.
    Never below Pillow's own limit: `_check_size` is stricter, and other code in the process may open pictures.
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
    if "<_io." in said:  # replaces "cannot identify image file <_io.BytesIO object at 0x…>"
        said = "its header is not valid"
    return RowError("damaged_image", f"The picture cannot be decoded completely: {said or type(error).__name__}.")


def _check_header(data: bytes, limits: ImageParameters) -> None:
    """Check the signature, and the declared size where it is at a fixed offset. No decoder is used."""
    if not data:
        raise RowError("empty_file", "The picture has no bytes.")
    found = signature(data)
    if found is None:
        start = ascii(data[:16].decode("latin-1"))
        raise RowError("not_an_image", f"The bytes are not a picture of a known format; they begin with {start}.")
    if found in MORE_FORMATS and found in limits.more_formats:
        return
    if found not in FORMATS:
        more = f" Or enable the format: image.more_formats=[{found}]." if found in MORE_FORMATS else ""
        allowed = ", ".join((*FORMATS, *limits.more_formats))
        detail = f"The picture is {found}; allowed are {allowed}. {way_to_convert(found)}{more}"
        raise RowError("unsupported_format", detail)
    size = declared_size(data, found)
    if size is not None:
        _check_size(size, limits)


def _check_size(size: tuple[int, int], limits: ImageParameters) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise RowError("zero_size_image", f"The picture has {width}x{height} pixels.")
    if width * height > limits.max_source_pixels:
        raise RowError(
            "too_many_pixels",
            f"The picture has {width}x{height} pixels; image.max_source_pixels allows {limits.max_source_pixels}.",
        )
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise RowError(
            "extreme_aspect_ratio",
            f"The picture has {width}x{height} pixels; image.max_aspect_ratio allows {limits.max_aspect_ratio:g} to 1.",
        )


def _reject_animation(image: Image.Image) -> None:
    """Reject animations: their caption may not describe the first frame, which is often blank."""
    if image.format in ("GIF", "WEBP", "PNG") and getattr(image, "is_animated", False):
        raise RowError("animated_image", "The picture is an animation. Store the frame that its caption describes.")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if absent or out of range."""
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
    """Convert any mode of the allowed formats to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _to_8_bit_grey(image)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() == (0, 0):
            return layer.convert("RGB")
        ground = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _scale_deep_colours(image: Image.Image, data: bytes) -> Image.Image:
    """Scale a PNG of 16-bit colours that use only 8 to 14 bits; return any other picture unchanged.

    Pillow keeps the high bytes, in which such colours are nearly black. The low bytes are decoded with the byte
    order swapped. Pillow cannot do this for grey with alpha, so there only the high bytes are scaled.
    """
    is_deep_png = image.format == "PNG" and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6")
    if not is_deep_png or "transparency" in image.info:
        return image
    import numpy as np

    values = np.left_shift(np.asarray(image), 8, dtype=np.uint32)
    if values[..., :3].max(initial=0) >= 2 ** _USUAL_BITS[-1]:
        return image
    with Image.open(io.BytesIO(data), formats=("PNG",)) as low:
        if data[25:26] != b"\4":
            low.tile = [tile._replace(args=f"{image.mode};16L") for tile in low.tile]  # type: ignore[attr-defined]
            values |= np.asarray(low)
    colours = _to_8_bits(values[..., :3])
    alpha = np.asarray(image)[..., 3:]
    scaled = Image.fromarray(np.concatenate([colours, alpha], axis=-1))
    scaled.info = image.info
    return scaled


def _to_8_bits(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Return the table from 16-bit values to 0…255, by the number of bits in use."""
    import numpy as np

    brightest = int(values.max(initial=0))
    highest = next((2**bits - 1 for bits in _USUAL_BITS if 0 < brightest < 2**bits), 65535)
    return ((values * 255 + highest // 2) // highest).astype(np.uint8)


def _to_8_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit values to 0…255, where Pillow's conversion may clip. A transparent grey becomes alpha."""
    import numpy as np

    values = np.asarray(image).astype(np.uint32).clip(0, 65535)
    grey = Image.fromarray(_to_8_bits(values))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _is_plain(image: Image.Image) -> bool:
    return all(highest - lowest <= PLAIN_MARGIN for lowest, highest in cast(_Ranges, image.getextrema()))


def _look(small: Image.Image) -> bytes:
    """Return a difference hash in colour: bits for cells much brighter, then much darker, than their right neighbour.

    A hash of greys alone would treat flat drawings that differ only in colour as copies.
    """
    import numpy as np

    cells = np.asarray(small, dtype=np.int16)
    steps = cells[:, :-1] - cells[:, 1:]
    bits = np.stack([steps > LOOK_MARGIN, steps < -LOOK_MARGIN])
    return np.packbits(bits).tobytes()
