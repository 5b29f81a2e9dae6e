"""Fingerprints of base models: hashes of their files, and of the vision tower alone.

Names, sizes and time stamps are not used; a single changed byte gives another fingerprint. This module reads
safetensors headers itself, so that neither torch nor the weights are loaded. Weights are checked in the pass
that hashes them: values that are not finite are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import BaseModelError, QwenVLLoraError
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.strict_json import kind_of, parse_json

if TYPE_CHECKING:
    from qwen_vl_lora.model.families import Family

WEIGHTS_SUFFIX = ".safetensors"
_CHUNK = 1 << 20
_MAX_HEADER = 100_000_000  # safetensors' own limit
_LFS_POINTER = b"version https://git-lfs"

_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}
"""Floating types → integer type to read them as, and the bits that are all set only in NaN and infinity.

F8_E4M3 has no infinity, and its two NaN have all bits but the sign set.
"""


def files_sha256(paths: list[Path]) -> dict[str, str]:
    """File name → hex sha256, hashed in parallel."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(file_sha256, paths), strict=True))


def weights_sha256(path: Path, error: type[QwenVLLoraError] = BaseModelError) -> str:
    """Hex sha256 of a safetensors file, whose weights are checked in the same pass.

    Raises:
        BaseModelError: (or `error`) as `stored_tensors`, or if a tensor has NaN or infinity.
    """
    import numpy as np

    tensors = list(stored_tensors(path, error))
    digest = hashlib.sha256()
    buffer = np.empty(_CHUNK, dtype=np.uint8)
    masked = np.empty(_CHUNK, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for length, bits, mask, name in _spans(tensors, path.stat().st_size):
            for part in _read_parts(file, buffer, length, path, error):
                digest.update(part)
                if mask:
                    values = part.view(bits)
                    exponents = np.bitwise_and(values, values.dtype.type(mask), out=masked[: part.size].view(bits))
                    if exponents.max() == mask:
                        raise error(
                            f"{path}: the tensor {name} has values that are NaN or infinite. Expected finite weights. "
                            "Take the file from its source again; if it is the same there, the model cannot be used."
                        )
    return digest.hexdigest()


def _spans(tensors: list[StoredTensor], size: int) -> Iterator[tuple[int, str, int, str]]:
    """For the header, then for each tensor: number of bytes, type, mask of the exponent bits, name."""
    yield (tensors[0].start if tensors else size), "u1", 0, ""
    for tensor in tensors:
        bits, mask = _EXPONENTS[tensor.dtype]
        yield tensor.stop - tensor.start, bits, mask, tensor.name


def _read_parts(file: Any, buffer: Any, length: int, path: Path, error: type[QwenVLLoraError]) -> Iterator[Any]:
    """The next `length` bytes in views of `buffer`. No view splits a number."""
    while length:
        wanted = min(length, _CHUNK)
        have = 0
        while have < wanted:
            count = file.readinto(memoryview(buffer)[have:wanted])
            if not count:
                raise error(f"{path} became shorter while it was read. Expected a file that no process writes to.")
            have += count
        yield buffer[:wanted]
        length -= wanted


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The position of one tensor in a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def stored_tensors(path: Path, error: type[QwenVLLoraError] = BaseModelError) -> Iterator[StoredTensor]:
    """The tensors of one safetensors file, from its header. Does not block and reads no weights.

    Args:
        error: class to raise; the file may belong to a base or an adapter.

    Raises:
        BaseModelError: (or `error`) if it is not a complete safetensors file of floating-point numbers.
    """
    try:
        yield from _tensors(path)
    except ValueError as cause:
        raise error(f"{path} cannot be used: {cause}. Fetch the file again, or take another version.") from cause


def _tensors(path: Path) -> list[StoredTensor]:
    """Raises: ValueError with the cause."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"expected a regular file, got {kind_of(status.st_mode)}")
    with path.open("rb") as file:
        header_size, header = _read_header(file, status.st_size)
    header.pop("__metadata__", None)
    first = 8 + header_size
    tensors = sorted(
        (_tensor(name, entry, path, first) for name, entry in header.items()), key=lambda t: (t.start, t.stop)
    )
    edges = [(first, first), *((tensor.start, tensor.stop) for tensor in tensors)]
    for (_, before), (start, _) in pairwise(edges):
        if start != before:
            raise ValueError(f"its header leaves a gap or an overlap at byte {before}")
    end = edges[-1][1]
    if end != status.st_size:
        last = tensors[-1].name if tensors else "its header"
        raise ValueError(f"it ends at byte {status.st_size} but {last} ends at {end}")
    return tensors


def _read_header(file: IO[bytes], size: int) -> tuple[int, dict[str, Any]]:
    start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError("it is a Git LFS pointer, a placeholder for the file itself (`git lfs pull` fetches it)")
    if size < 8:
        raise ValueError(f"expected a safetensors file, got {size} bytes")
    header_size = int.from_bytes(start[:8], "little")
    if header_size > min(_MAX_HEADER, size - 8):
        raise ValueError(f"it is not a safetensors file, or it is cut: a header of {header_size} bytes in {size}")
    file.seek(8)
    header = parse_json(file.read(header_size))
    if not isinstance(header, dict):
        raise ValueError(f"expected an object as safetensors header, got {type(header).__name__}")
    return header_size, header


def _tensor(name: str, entry: Any, path: Path, first: int) -> StoredTensor:
    said: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = said.get("dtype"), _counts(said.get("shape")), _counts(said.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _EXPONENTS:
        raise ValueError(f"the tensor {name} has the type {dtype}; expected {', '.join(_EXPONENTS)}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(f"the header's entry of tensor {name} is damaged: {str(entry)[:200]}")
    start, stop = offsets
    needed = math.prod(shape) * int(_EXPONENTS[dtype][0][-1])
    if stop - start != needed:
        raise ValueError(f"the tensor {name} of {dtype} {list(shape)} needs {needed} bytes, got {stop - start}")
    return StoredTensor(name, dtype, shape, path, first + start, first + stop)


def _counts(values: Any) -> tuple[int, ...] | None:
    """A list of integers of at least 0 as a tuple, or None for anything else."""
    if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values):
        return tuple(values)
    return None


def vision_sha256(weight_files: list[Path], family: Family) -> str:
    """Hex sha256 over name, dtype, shape and bytes of every vision tensor.

    The value does not depend on how the tensors are distributed over files.

    Raises:
        BaseModelError: if no file has a vision tensor.
    """
    tensors = [tensor for path in weight_files for tensor in stored_tensors(path)]
    named = [(name, tensor) for tensor in tensors if (name := family.name_in_tower(tensor.name)) is not None]
    if not named:
        raise BaseModelError(
            f"No vision tower (tensors named {family.tower_name}.*) in {[str(path) for path in weight_files]}."
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left:
                chunk = file.read(min(left, _CHUNK))
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()
