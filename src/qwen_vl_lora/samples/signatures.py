"""Recognises formats by the first bytes. No decoder is used, and file names are not trusted."""

from __future__ import annotations

import contextlib
import struct

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
    (b"II+\x00", "BigTIFF"),
    (b"MM\x00+", "BigTIFF"),
    (b"IIRO", "a raw photo (ORF)"),
    (b"IIRS", "a raw photo (ORF)"),
    (b"MMOR", "a raw photo (ORF)"),
    (b"IIU\x00", "a raw photo (RW2)"),
    (b"FUJIFILMCCD-RAW", "a raw photo (RAF)"),
    (b"\x00MRM", "a raw photo (MRW)"),
    (b"FOVb", "a raw photo (X3F)"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"gimp xcf", "XCF (GIMP)"),
    (b"SIMPLE  =", "FITS"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"v/1\x01", "OpenEXR"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\x1aE\xdf\xa3", "a video (Matroska)"),
    *((b"P%d" % kind + blank, "a portable anymap") for kind in range(1, 8) for blank in (b"\n", b" ", b"\r", b"\t")),
)

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_DNG_VERSION, _SUB_PICTURES, _KIND_OF_PICTURE = 50706, 330, 254

_REMEDIES = {
    "HEIC": "magick picture.heic picture.jpg, or on a Mac sips -s format jpeg picture.heic --out picture.jpg",
    "AVIF": "magick picture.avif picture.jpg",
    "TIFF": "magick picture.tif picture.png",
    "BigTIFF": "vips copy picture.tif picture.png",
    "JPEG 2000": "magick picture.jp2 picture.png",
    "JPEG XL": "djxl picture.jxl picture.png",
    "DICOM": "dcmj2pnm --write-png picture.dcm picture.png",
    "PDF": "pdftoppm -png -r 150 paper.pdf page",
    "SVG": "rsvg-convert drawing.svg -o drawing.png",
    "a raw photo": "darktable-cli photo.nef photo.jpg, or the program of the camera",
    "a video": "ffmpeg -i film.mp4 -frames:v 1 frame.png",
}


def signature(data: bytes) -> str | None:
    for start, name in _SIGNATURES:
        if data.startswith(start):
            return _kind_of_tiff(data) if name == "TIFF" else name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "a video (AVI)"
    if data[4:8] == b"ftyp":
        return _kind_of_ftyp(data)
    if data[128:132] == b"DICM":
        return "DICOM"
    if b"<svg" in data[:1024].lower():
        return "SVG"
    return None


def _kind_of_ftyp(data: bytes) -> str:
    """Recognise a format by the brands of the ISO container, which pictures, raw photos and videos share."""
    length = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, length, 4))]
    if brands[0] == b"crx ":
        return "a raw photo (CR3)"
    if any(brand in (b"avif", b"avis") for brand in brands):
        return "AVIF"
    if any(brand in _HEIC_BRANDS for brand in brands):
        return "HEIC"
    return "a video (MP4 or MOV)"


def _kind_of_tiff(data: bytes) -> str:
    """Recognise TIFF or a raw photo based on it: NEF, ARW, PEF store a preview first, DNG has its own tag."""
    if data[8:10] == b"CR":
        return "a raw photo (CR2)"
    order = "<" if data[:2] == b"II" else ">"
    tags: dict[int, int] = {}
    with contextlib.suppress(struct.error):
        (offset,) = struct.unpack_from(f"{order}I", data, 4)
        (number,) = struct.unpack_from(f"{order}H", data, offset)
        for place in range(offset + 2, offset + 2 + 12 * min(number, 200), 12):
            tag, kind, _ = struct.unpack_from(f"{order}HHI", data, place)
            tags[tag] = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", data, place + 8)[0]
    if _DNG_VERSION in tags:
        return "a raw photo (DNG)"
    if _SUB_PICTURES in tags and tags.get(_KIND_OF_PICTURE) == 1:
        return "a raw photo (NEF, ARW or PEF)"
    return "TIFF"


def declared_size(data: bytes, name: str) -> tuple[int, int] | None:
    """Return width and height from the header; None for JPEG, whose size has no fixed offset, and for short files.

    Needed before Pillow opens the file: it refuses a size of 0 without a clear error, and its WebP
    decoder allocates the canvas when the file is opened.
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


def way_to_convert(kind: str) -> str:
    """Return the remedy for an unsupported format."""
    command = _REMEDIES.get(kind.partition(" (")[0])
    return f"Convert it to JPEG or PNG{f': {command}' if command else ''}."
