"""What identifies a base model: the bytes of its files, and of its vision tower alone.

Names, sizes and time stamps are never trusted; a single changed byte gives another fingerprint.
Reads safetensors headers itself, so that neither torch nor the weights come into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_lora.exceptions import BaseModelError

VISION_TENSOR = re.compile(r"^(model\.)?visual\.")
_CHUNK = 1 << 22


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(paths: list[Path]) -> dict[str, str]:
    """File name → hex sha256, hashed in parallel."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one safetensors file, from its header.

    Raises:
        BaseModelError: if the header cannot be read or the file is shorter than it says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
    except (ValueError, OverflowError, MemoryError) as error:
        raise BaseModelError(f"{path} is no safetensors file: {error}. Fetch it again.") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, stop = (8 + header_size + offset for offset in entry["data_offsets"])
        if stop > size:
            raise BaseModelError(f"{path} ends at byte {size} but tensor {name} ends at {stop}. Fetch the file again.")
        yield StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start, stop)


def vision_sha256(weight_files: list[Path]) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every vision tensor.

    The same tower gives the same value however its tensors are spread over files.

    Raises:
        BaseModelError: if no file holds a vision tensor.
    """
    tensors = [t for path in weight_files for t in stored_tensors(path) if VISION_TENSOR.match(t.name)]
    if not tensors:
        raise BaseModelError(f"No vision tower (tensors named visual.*) in {[str(path) for path in weight_files]}.")
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda t: VISION_TENSOR.sub("", t.name)):
        name = VISION_TENSOR.sub("", tensor.name)
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left:
                chunk = file.read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
