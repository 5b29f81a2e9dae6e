"""AVIF, HEIC and TIFF: read where `image.more_formats` names them, as safely as the others; else refused by name."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen_vl_lora.samples.image_files import inspect_image, measure_image, open_image
from qwen_vl_lora.samples.more_formats import MORE_FORMATS
from qwen_vl_lora.samples.records import RowError
from samples.pictures import ORIENTATION, encode, image_parameters, picture
from samples.test_image_files import _mutate

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
needs_heif = pytest.mark.skipif(pillow_heif is None, reason="pillow-heif is not installed: pip install -e '.[heif]'")
EACH = pytest.mark.parametrize("kind", ["AVIF", "TIFF", pytest.param("HEIC", marks=needs_heif)])
ALL = image_parameters(more_formats=list(MORE_FORMATS))


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    image = picture(3) if image is None else image
    if kind != "HEIC":
        return encode(image, kind, **options)
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=95, **options)
    return buffer.getvalue()


def heic_header(brand: bytes = b"heic") -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + b"\0" * 40


def fault_of(data: bytes, limits=ALL) -> RowError:
    with pytest.raises(RowError) as fault:
        inspect_image(data, limits)
    return fault.value


@EACH
def test_a_format_that_is_asked_for_is_read(kind):
    data = encoded(kind)
    facts = inspect_image(data, ALL)
    assert (facts.width, facts.height, facts.is_plain) == (40, 30, False)
    assert facts.suffix == {"AVIF": ".avif", "TIFF": ".tif", "HEIC": ".heic"}[kind]
    assert measure_image(io.BytesIO(data), ALL) == (40, 30)
    assert np.abs(np.asarray(open_image(data), int) - np.asarray(picture(3), int)).mean() < 8


@EACH
def test_a_format_that_is_not_asked_for_is_refused_with_both_ways_out(kind):
    fault = fault_of(encoded(kind), image_parameters())
    assert fault.reason == "unsupported_format"
    assert f"The picture is {kind}" in fault.detail
    assert "Convert it to JPEG or PNG: magick " in fault.detail
    assert f"image.more_formats=[{kind}]" in fault.detail


def test_without_pillow_heif_a_heic_picture_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    fault = fault_of(heic_header())
    assert fault.reason == "unsupported_format"
    assert "pip install -e '.[heif]'" in fault.detail


@EACH
@pytest.mark.parametrize(("reason", "size"), [("too_many_pixels", (400, 300)), ("extreme_aspect_ratio", (804, 4))])
def test_limits_are_those_of_any_picture_and_hold_before_decoding(kind, reason, size, monkeypatch):
    data = encoded(kind, picture(0, size))
    monkeypatch.setattr(Image.Image, "load", None)  # of any decoder
    assert fault_of(data).reason == reason
    with pytest.raises(RowError):
        measure_image(io.BytesIO(data), ALL)


@EACH
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_shown_upright(kind, orientation):
    upright = Image.new("RGB", (64, 48), "white")
    upright.paste("red", (0, 0, 32, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if kind == "HEIC":  # writes the turn into the container, as phones do
        buffer = io.BytesIO()
        pillow_heif.encode("RGB", stored.size, stored.tobytes(), buffer, exif=exif.tobytes(), quality=95)
        data = buffer.getvalue()
    else:
        data = encoded(kind, stored, exif=exif)
    facts = inspect_image(data, ALL)
    opened = open_image(data)
    assert (facts.width, facts.height) == opened.size == (64, 48)
    assert np.abs(np.asarray(opened, int) - np.asarray(upright, int)).mean() < 12


@pytest.mark.parametrize("codec", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_usual_tiffs_are_read_right(codec, mode):
    image = picture(3).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    data = encode(image, "TIFF", compression=None if codec == "raw" else codec)
    shown = picture(3).convert("L").convert("RGB") if mode in ("L", "I;16") else picture(3)
    assert np.abs(np.asarray(open_image(data), int) - np.asarray(shown, int)).max() <= 1
    assert inspect_image(data, ALL).suffix == ".tif"


def test_twelve_bits_in_a_tiff_of_sixteen_are_scaled():
    values = (np.linspace(0, 4095, 1200).reshape(30, 40)).astype(np.uint16)
    shown = np.asarray(open_image(encode(Image.fromarray(values), "TIFF")))
    assert shown[0, 0, 0] == 0
    assert shown[-1, -1, 0] == 255


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        (picture(3).convert("1"), {}, "mode 1"),
        (picture(3).convert("1"), {"compression": "group4"}, "codec group4"),
        (picture(3).convert("P"), {}, "mode P"),
        (picture(3).convert("CMYK"), {}, "mode CMYK"),
        (Image.fromarray(np.ones((8, 8), np.float32)), {}, "mode F"),
        (Image.fromarray(np.ones((8, 8), np.int32)), {}, "mode I"),
        (picture(3), {"compression": "jpeg"}, "codec jpeg"),
        (picture(3).convert("L").convert("I;16"), {"tiffinfo": {262: 0}}, "mode I;16"),
    ],
)
def test_other_tiffs_are_refused_by_what_they_are(image, options, words):
    fault = fault_of(encode(image, "TIFF", **options))
    assert fault.reason == "unsupported_format"
    assert words in fault.detail


def test_a_tiff_of_several_pages_is_refused_and_its_pages_are_not_counted():
    pages = encode(picture(1), "TIFF", save_all=True, append_images=[picture(2), picture(3)])
    assert fault_of(pages).reason == "several_pictures"


@needs_heif
def test_a_heic_of_several_pictures_is_refused():
    several = pillow_heif.from_pillow(picture(1))
    several.add_from_pillow(picture(2))
    buffer = io.BytesIO()
    several.save(buffer)
    assert fault_of(buffer.getvalue()).reason == "several_pictures"


def test_an_animated_avif_is_refused():
    moving = encode(picture(1), "AVIF", save_all=True, append_images=[picture(2)])
    assert fault_of(moving).reason in ("several_pictures", "animated_image")


@pytest.mark.parametrize(
    "data",
    [
        # A directory of 65,535 entries outside of the file, one that follows itself, a BigTIFF, strips beyond the end.
        b"II*\x00\xff\xff\xff\x7f" + b"\xff" * 64,
        b"II*\x00\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0",
        b"II+\x00" + b"\x08\0\0\0" + b"\xff" * 64,
        b"MM\x00*\0\0\0\x08\xff\xff" + b"\1\0\0\3\xff\xff\xff\xff\0\0\0\0" * 20,
        heic_header(b"avif"),
        heic_header(),
    ],
)
def test_headers_that_promise_what_is_not_there_are_one_fault(data):
    assert fault_of(data).reason in ("damaged_image", "unsupported_format", "zero_size_image")


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), number=st.integers(0, 20))
def test_mutated_pictures_of_these_formats_are_read_whole_or_rejected(seed, number):
    data = _mutate(ORIGINALS[number % len(ORIGINALS)], random.Random(seed))
    try:
        facts = inspect_image(data, ALL)
    except RowError:
        return
    assert open_image(data).size == (facts.width, facts.height)


ORIGINALS = [
    encoded("AVIF"),
    encoded("AVIF", picture(3).convert("RGBA")),
    *(encode(picture(3), "TIFF", compression=codec) for codec in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")),
    encode(picture(3).convert("L").convert("I;16"), "TIFF"),
    encode(picture(3), "TIFF", save_all=True, append_images=[picture(2)]),
    *([] if pillow_heif is None else [encoded("HEIC"), encoded("HEIC", picture(3).convert("RGBA"))]),
]

RAW_TIFF = struct.pack("<HHII", 254, 4, 1, 1) + struct.pack("<HHII", 330, 4, 1, 200)
DNG = struct.pack("<HHII", 50706, 1, 4, 0x00000401)


@pytest.mark.parametrize(
    ("name", "remedy", "data"),
    [
        ("DICOM", "dcmj2pnm", b"\0" * 128 + b"DICM" + b"\2\0"),
        ("JPEG 2000", "magick", b"\x00\x00\x00\x0cjP  \r\n\x87\n"),
        ("JPEG 2000", "magick", b"\xff\x4f\xff\x51\0\x29"),
        ("a raw photo (CR3)", "darktable-cli", heic_header(b"crx ")),
        ("a raw photo (CR2)", "darktable-cli", b"II*\0\x10\0\0\0CR\2\0" + bytes(20)),
        ("a raw photo (DNG)", "darktable-cli", b"II*\0\x08\0\0\0\x01\0" + DNG + bytes(8)),
        ("a raw photo (NEF, ARW or PEF)", "darktable-cli", b"II*\0\x08\0\0\0\x02\0" + RAW_TIFF + bytes(8)),
        ("HEIC", "sips", heic_header()),
        ("HEIC", "sips", heic_header(b"mif1")),
        ("AVIF", "magick", heic_header(b"avif")),
        ("a video (MP4 or MOV)", "ffmpeg", heic_header(b"isom").replace(b"mif1", b"mp42")),
        ("BigTIFF", "vips", b"II+\0\x08\0\0\0" + bytes(8)),
        ("PDF", "pdftoppm", b"%PDF-1.7\n"),
    ],
)
def test_a_format_that_is_not_read_is_named_with_the_way_to_convert_it(name, remedy, data):
    fault = fault_of(data, image_parameters())
    assert fault.reason == "unsupported_format"
    assert f"The picture is {name};" in fault.detail
    assert remedy in fault.detail


def test_their_decoders_are_not_loaded_where_nobody_asks():
    code = (
        "import sys, qwen_vl_lora.samples.image_files; "
        "sys.exit(any(name in sys.modules for name in ('PIL.TiffImagePlugin', 'PIL.AvifImagePlugin', 'pillow_heif')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
