"""Encoded pictures and parameter groups for the tests of samples, datasets and the data_engineering pipeline."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from qwen_vl_lora.parameters import CaptionsParameters, ImageParameters, PromptParameters, QuarantineParameters
from qwen_vl_lora.samples.workspace import Workspace

PROJECT = Path(__file__).parents[2]
PARAMETERS = yaml.safe_load((PROJECT / "conf" / "base" / "parameters.yml").read_text(encoding="utf-8"))
ORIENTATION = 0x0112


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colourful picture: other seeds give pictures that do not look alike."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, size: tuple[int, int] = (40, 30), **options) -> bytes:
    return encode(picture(seed, size), "JPEG", **options)


def png(seed: int = 0, size: tuple[int, int] = (40, 30)) -> bytes:
    return encode(picture(seed, size), "PNG")


def animation(image_format: str) -> bytes:
    frames = [picture(seed) for seed in range(3)]
    return encode(frames[0], image_format, save_all=True, append_images=frames[1:])


def png_of(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, **chunks: bytes) -> bytes:
    """A PNG of given parts, for what Pillow does not write; `rows` each begin with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = [(name.encode(), data) for name, data in chunks.items()]
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def png_of_declared_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose data is a few bytes: a decompression bomb in small."""
    return png_of(width, height, b"\0" * 10)


def jpeg_with(segment: bytes, marker: int = 0xE1) -> bytes:
    """A JPEG with one more segment in front, such as EXIF of any bytes."""
    plain = jpeg()
    return plain[:2] + struct.pack(">BBH", 0xFF, marker, len(segment) + 2) + segment + plain[2:]


def write(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def workspace_folder(project: Path) -> Workspace:
    """The workspace of a project's catalog, its folder made."""
    data = project / "data"
    workspace = Workspace(
        path=data / "09_workspace" / "tiny",
        project=project,
        images=data / "02_intermediate" / "tiny" / "images" / "files",
        feature_store=data / "04_feature" / "tiny" / "image_features",
        adapters=data / "06_models" / "tiny" / "adapter",
    )
    workspace.path.mkdir(parents=True, exist_ok=True)
    return workspace


def image_parameters(**changes) -> ImageParameters:
    """The project's own settings, so that a new key needs no mention here; small pictures are already too large."""
    return ImageParameters.model_validate(PARAMETERS["image"] | {"max_source_pixels": 100_000} | changes)


def captions_parameters(**changes) -> CaptionsParameters:
    return CaptionsParameters.model_validate(PARAMETERS["captions"] | changes)


def quarantine_parameters(max_share: float = 1.0) -> QuarantineParameters:
    return QuarantineParameters(max_share=max_share)


def prompt_parameters(**changes) -> PromptParameters:
    return PromptParameters.model_validate(PARAMETERS["prompt"] | {"user": "COCO Yes:"} | changes)
