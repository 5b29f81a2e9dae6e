from __future__ import annotations

import io
import random
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from qwen_vl_lora.samples.image_files import inspect_image, measure_image, open_image
from qwen_vl_lora.samples.looks import MAX_DISTANCE
from qwen_vl_lora.samples.records import RowError
from samples.pictures import (
    ORIENTATION,
    animation,
    encode,
    image_parameters,
    jpeg,
    jpeg_with,
    picture,
    png,
    png_of,
    png_of_declared_size,
)

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def _gif_of_declared_size(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0;"


def _webp_of_declared_canvas(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    chunk = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        pytest.param("empty_file", b"", id="no bytes"),
        pytest.param("not_an_image", HTML, id="HTML saved as JPEG"),
        pytest.param("not_an_image", b"\0" * 100, id="zeros"),
        pytest.param("damaged_image", jpeg()[:300], id="truncated JPEG header"),
        pytest.param("damaged_image", jpeg(size=(200, 200))[:-2000], id="truncated JPEG"),
        pytest.param("damaged_image", png(size=(200, 200))[:-2000], id="truncated PNG"),
        pytest.param("damaged_image", encode(picture(size=(200, 200)), "WEBP")[:-500], id="truncated WebP"),
        pytest.param("damaged_image", png()[:-20] + b"\xff" + png()[-19:], id="PNG with a wrong checksum"),
        pytest.param("zero_size_image", png_of_declared_size(0, 10), id="PNG of no width"),
        pytest.param("zero_size_image", _gif_of_declared_size(10, 0), id="GIF of no height"),
        pytest.param("too_many_pixels", png_of_declared_size(400, 300), id="PNG above the limit"),
        pytest.param("too_many_pixels", png_of_declared_size(60_000, 60_000), id="PNG bomb"),
        pytest.param("too_many_pixels", _webp_of_declared_canvas(16_000, 16_000), id="WebP bomb"),
        pytest.param("too_many_pixels", jpeg(size=(400, 300)), id="JPEG above the limit"),
        pytest.param("extreme_aspect_ratio", png(size=(402, 2)), id="extreme aspect ratio"),
        pytest.param("animated_image", animation("GIF"), id="animated GIF"),
        pytest.param("animated_image", animation("WEBP"), id="animated WebP"),
        pytest.param("animated_image", animation("PNG"), id="animated PNG"),
        pytest.param("unsupported_format", encode(picture(), "TIFF"), id="TIFF"),
        pytest.param("unsupported_format", encode(picture(), "EPS"), id="EPS"),
        pytest.param("unsupported_format", encode(picture(), "PDF"), id="PDF"),
        pytest.param("unsupported_format", b'<?xml version="1.0"?><svg xmlns="x"/>', id="SVG"),
        pytest.param("unsupported_format", encode(picture(), "AVIF"), id="AVIF"),
    ],
)
def test_bad_bytes_are_rejected_with_their_reason(reason, data):
    with pytest.raises(RowError) as fault:
        inspect_image(data, image_parameters())
    assert fault.value.reason == reason


@pytest.mark.parametrize("image_format", ["EPS", "PDF", "TGA"])
def test_formats_outside_the_allow_list_are_not_opened_either(image_format):
    with pytest.raises(RowError, match="cannot be decoded"):
        open_image(encode(picture(), image_format))


@pytest.mark.parametrize(
    ("image_format", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp")]
)
def test_suffix_and_size_follow_from_the_bytes(image_format, suffix):
    facts = inspect_image(encode(picture(), image_format), image_parameters())
    assert (facts.suffix, facts.width, facts.height) == (suffix, 40, 30)


def test_one_pixel_is_read_right():
    data = encode(Image.new("RGB", (1, 1), (10, 200, 30)), "PNG")
    assert inspect_image(data, image_parameters()).width == 1
    assert open_image(data).getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_picture_and_its_size(orientation, image_format):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 24, 16))  # the red corner shows every turn and flip
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Image.Transpose that makes the stored picture
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(stored, image_format, exif=exif, quality=95)
    facts = inspect_image(data, image_parameters())
    opened = open_image(data)
    assert (facts.width, facts.height) == opened.size == (48, 32)
    assert np.abs(np.asarray(opened, int) - np.asarray(upright, int)).mean() < 12  # JPEG smears the red edge


def test_transparent_parts_become_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 255, 255))
    palette = rgba.convert("P")
    palette.info["transparency"] = palette.getpixel((3, 3))
    grey = Image.new("LA", (4, 4), (0, 0))
    grey.putpixel((0, 0), (77, 255))
    for image, corner in ((rgba, (0, 0, 255)), (palette, None), (grey, (77, 77, 77))):
        opened = open_image(encode(image, "PNG"))
        assert opened.mode == "RGB"
        assert opened.getpixel((3, 3)) == (255, 255, 255)
        assert corner is None or opened.getpixel((0, 0)) == corner


def test_transparency_survives_a_turn():
    image = Image.new("L", (4, 2), 10)
    image.putpixel((0, 0), 99)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    opened = open_image(encode(image, "PNG", transparency=10, exif=exif))
    assert opened.size == (2, 4)
    assert sorted(
        set(opened.getdata() if not hasattr(opened, "get_flattened_data") else opened.get_flattened_data())
    ) == [
        (99, 99, 99),
        (255, 255, 255),
    ]


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    opened = open_image(encode(Image.fromarray(values), "PNG"))
    # 65535 / 255 = 257 exactly.
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_cmyk_is_converted():
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = open_image(data).getpixel((4, 4))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_every_mode_becomes_rgb(image_format, mode):
    data = encode(picture().convert(mode), image_format)
    inspect_image(data, image_parameters())
    assert open_image(data).mode == "RGB"


def test_a_copy_that_was_scaled_and_encoded_again_looks_alike():
    looks = [
        np.frombuffer(inspect_image(data, image_parameters()).look, dtype=np.uint8)
        for data in (png(1, (320, 240)), encode(picture(1, (320, 240)).resize((240, 180)), "JPEG", quality=70), png(2))
    ]
    distances = [int(np.bitwise_count(looks[0] ^ look).sum()) for look in looks]
    assert distances[1] <= MAX_DISTANCE < distances[2]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(240, 180), (120, 90), (700, 525)])
def test_a_jpeg_that_is_decoded_small_looks_like_copies_of_other_sizes(image_format, size):
    limits = image_parameters(max_source_pixels=10**6)
    colours = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    photo = Image.fromarray(colours).resize((480, 360), Image.Resampling.BICUBIC)
    copies = encode(photo, "JPEG", quality=90), encode(photo.resize(size), image_format)
    looks = [np.frombuffer(inspect_image(data, limits).look, dtype=np.uint8) for data in copies]
    assert int(np.bitwise_count(looks[0] ^ looks[1]).sum()) <= MAX_DISTANCE


@pytest.mark.parametrize("progressive", [False, True])
def test_a_damaged_jpeg_is_rejected_although_it_is_decoded_small(progressive):
    limits = image_parameters(max_source_pixels=10**6)
    data = encode(picture(3, (640, 480)), "JPEG", quality=90, progressive=progressive)
    assert inspect_image(data, limits).width == 640
    for share in (0.3, 0.7, 0.95, 0.995):
        with pytest.raises(RowError, match="truncated"):
            inspect_image(data[: int(share * len(data))], limits)


def test_a_jpeg_of_one_colour_with_a_dot_is_not_plain_although_it_is_decoded_small():
    plain = Image.new("RGB", (640, 480), (40, 120, 90))
    limits = image_parameters(max_source_pixels=10**6)
    assert inspect_image(encode(plain, "JPEG"), limits).is_plain
    plain.paste((60, 120, 90), (300, 200, 302, 202))
    assert not inspect_image(encode(plain, "JPEG", quality=95), limits).is_plain


def test_the_configured_limit_is_the_limit_where_pillow_has_a_lower_one(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000)  # 89,478,485 by itself; it errs at twice
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(picture(size=(100, 75)), image_format)
        facts = inspect_image(data, image_parameters(max_source_pixels=7_500))
        assert open_image(data, max_pixels=7_500).size == (facts.width, facts.height) == (100, 75)
        assert measure_image(io.BytesIO(data), image_parameters(max_source_pixels=7_500)) == (100, 75)
        with pytest.raises(RowError, match=r"image\.max_source_pixels"):
            inspect_image(data, image_parameters(max_source_pixels=7_499))
        assert Image.MAX_IMAGE_PIXELS == 3_000
    with pytest.raises(Image.DecompressionBombError):  # nobody else in the process may open it
        Image.open(io.BytesIO(data))


def test_threads_that_inspect_at_once_raise_no_limit_for_good(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    all_at_once = threading.Barrier(8)

    def inspect(seed: int) -> int:
        all_at_once.wait(timeout=60)
        return sum(inspect_image(data, image_parameters()).width for data in [jpeg(seed, (100, 75))] * 50)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(inspect, range(8))) == [5_000] * 8
    assert Image.MAX_IMAGE_PIXELS == 1_000


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("not_an_image", HTML),
        ("unsupported_format", encode(picture(), "TIFF")),
        ("too_many_pixels", png_of_declared_size(60_000, 60_000)),
        ("too_many_pixels", jpeg(size=(400, 300))),
        ("extreme_aspect_ratio", jpeg(size=(402, 2))),
        ("damaged_image", jpeg()[:300]),
    ],
)
def test_a_header_alone_tells_what_a_whole_picture_would_be_rejected_for(reason, data):
    with pytest.raises(RowError) as fault:
        measure_image(io.BytesIO(data), image_parameters())
    assert fault.value.reason == reason


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


ORIGINALS = [
    jpeg(3),
    jpeg(3, progressive=True),
    png(3),
    encode(picture(3).convert("P"), "PNG"),
    encode(picture(3), "GIF"),
    encode(picture(3), "WEBP"),
    encode(picture(3), "WEBP", lossless=True),
    encode(picture(3), "BMP"),
    encode(
        picture(3),
        "JPEG",
        exif=_exif(6),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ),
    encode(picture(3).convert("CMYK"), "JPEG"),
    encode(Image.new("I;16", (40, 30), 999), "PNG", transparency=999, exif=_exif(3)),
    encode(picture(3).convert("LA"), "PNG"),
    encode(picture(3).convert("P"), "PNG", transparency=1),
    encode(picture(3).convert("RGBA"), "WEBP"),
    animation("GIF"),
    animation("WEBP"),
    animation("PNG"),
    encode(picture(3), "MPO", save_all=True, append_images=[picture(4)]),
    png_of(2, 2, b"\0\xff\xff\x80\0\0\0\0\x01\0\0\x01\x01" * 2, depth=16),
    png_of(4, 2, b"\0\x0f\xf0" * 2, depth=4, colour=0, tRNS=b"\0\x0f"),
    png_of(
        40,
        30,
        (b"\0" + b"\7\0\xff" * 40) * 30,
        iCCP=b"x\0\0no zlib",
        eXIf=b"II*\0\x08\0\0\0\xff\xff",
        zTXt=b"k\0\0junk",
    ),
    jpeg_with(b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    jpeg_with(b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
]
"""A file of every kind that is read: baseline and progressive, turned, in CMYK, 16 bits deep, transparent, moving, of
two views, with colour profiles, EXIF and texts that are broken themselves."""

FUZZING_SEED = 20261125
NUM_MUTATIONS = 1_000_000


def _assert_read_whole_or_rejected(data: bytes) -> None:
    try:
        facts = inspect_image(data, image_parameters())
    except RowError:
        return
    assert open_image(data).size == (facts.width, facts.height)


@given(data=st.binary(max_size=200), start=st.sampled_from([b"", *(original[:40] for original in ORIGINALS)]))
def test_random_bytes_are_read_whole_or_rejected(data, start):
    _assert_read_whole_or_rejected(start + data)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it repairs
@settings(max_examples=300)
@given(original=st.sampled_from(ORIGINALS), seed=st.integers(0, 2**32))
def test_mutated_pictures_are_read_whole_or_rejected(original, seed):
    _assert_read_whole_or_rejected(_mutate(original, random.Random(seed)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_pictures_are_read_whole_or_rejected():
    rng = random.Random(FUZZING_SEED)
    for _ in range(NUM_MUTATIONS):
        _assert_read_whole_or_rejected(_mutate(rng.choice(ORIGINALS), rng))


def _mutate(data: bytes, rng: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(mutated))
        match rng.randrange(4):
            case 0:
                mutated[place] = rng.randrange(256)
            case 1:
                mutated[place] ^= 1 << rng.randrange(8)
            case 2:
                del mutated[place : place + rng.randint(1, 20)]
            case 3:
                mutated[place:place] = rng.randbytes(rng.randint(1, 8))
        if not mutated:
            return b""
    return bytes(mutated[: rng.randint(1, len(mutated))] if rng.random() < 0.2 else mutated)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("colour", [0, 2, 6])
def test_bits_that_sixteen_leave_empty_are_scaled(bits, colour):
    channels = {0: 1, 2: 3, 6: 4}[colour]
    values = np.linspace(0, 2**bits - 1, 64).astype(">u2").reshape(8, 8, 1).repeat(channels, axis=2)
    if channels == 4:
        values[..., 3] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    shown = np.asarray(open_image(png_of(8, 8, rows, depth=16, colour=colour)), int)
    expected = np.linspace(0, 255, 64).reshape(8, 8, 1)
    assert np.abs(shown - expected).max() <= 2
    assert not inspect_image(png_of(8, 8, rows, depth=16, colour=colour), image_parameters()).is_plain


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_where_every_pixel_is_clear_the_colours_are_shown(image_format, mode):
    image = picture(3)
    shown = image
    options: dict[str, object] = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    if mode == "P" or image_format == "GIF":
        image = Image.new("P", (40, 30), 1)
        image.putpalette([9, 9, 9, 200, 100, 50])
        shown = image.convert("RGB")
        options |= {"transparency": 1}
    else:
        image = image.convert(mode)
        shown = image.convert("RGB")
        image.putalpha(0)
    if image_format == "WEBP" and mode == "P":
        image = image.convert("RGB")
        image.putalpha(0)
        options.pop("transparency")
    opened = np.asarray(open_image(encode(image, image_format, **options)), int)
    assert np.abs(opened - np.asarray(shown, int)).max() <= 4


def test_a_bitmap_whose_fourth_channel_is_empty_shows_its_colours():
    """What many programs write as BMP of 32 bits: the fourth byte is padding."""
    header = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    data = b"BM" + struct.pack("<IHHI", 14 + 108 + 16, 0, 0, 14 + 108) + header + masks + b"\x32\x64\xc8\0" * 4
    assert open_image(data).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize("colour", ["white", "black", (3, 200, 90)])
def test_a_picture_of_one_colour_is_plain_and_one_with_a_dot_is_not(colour):
    plain = Image.new("RGB", (40, 30), colour)
    assert inspect_image(encode(plain, "PNG"), image_parameters()).is_plain
    assert inspect_image(encode(plain, "JPEG"), image_parameters()).is_plain
    plain.putpixel((7, 7), (130, 20, 200))
    assert not inspect_image(encode(plain, "PNG"), image_parameters()).is_plain
