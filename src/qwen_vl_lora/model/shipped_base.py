"""The small base that comes with the project: known by its fingerprint, and by what it cannot do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.pages.language import ENGLISH, Language
from qwen_vl_lora.runs.storage import make_folder, temporary

if TYPE_CHECKING:
    from qwen_vl_lora.model.adapter import Adapter
    from qwen_vl_lora.model.base_model import BaseModel

FINGERPRINT = "7cc7340a45d92fe7463a68a7489fd41847da0348284085d127607741d3a8d11c"
DRAWINGS = "ScenesDataset"
"""Class of the only source whose pictures this base knows."""

NOT_FOR_PHOTOGRAPHS = (
    "The base model is the small one that comes with the project: it knows drawings of coloured shapes only, and its "
    "captions of photographs mean nothing. For photographs train a real base: --env own_captions_qwen."
)

PLACE = "data/06_models/tiny_qwen2_vl"
"""Where a project has it, as its globals.yml names it."""

_LARGEST_BYTES = 50_000_000
"""Weights of a base that may be this one."""

_PACKAGED = Path(__file__).parents[1] / "tiny" / "base"
"""Its files in the wheel; a clone has them at PLACE."""


def unpack(folder: Path) -> None:
    """Copy the base to `folder`, whole or not at all, if it is not there and the wheel brought it."""
    if folder.exists() or not _PACKAGED.is_dir():
        return
    make_folder(folder.parent)
    partial = temporary(folder)
    try:
        shutil.copytree(_PACKAGED, partial)
        partial.rename(folder)
    except OSError:  # another process was quicker
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_shipped(base_model: BaseModel, adapter: Adapter | None) -> bool:
    """Whether captions come from this base. A large base is not read for it."""
    if adapter is not None:
        return bool(adapter.record["base_model"]["fingerprint"] == FINGERPRINT)
    size = sum(file.stat().st_size for file in base_model.path.glob("*.safetensors"))
    return 0 < size < _LARGEST_BYTES and base_model.fingerprint == FINGERPRINT


def note_on_base(record: Mapping[str, Any], language: Language = ENGLISH) -> str | None:
    """Return a warning, in a language, if an adapter was trained with this base on anything but its drawings.

    Args:
        record: of the adapter; one of an older version may not name the source.
    """
    run = record.get("run", {})
    read = run.get("read", {}).get("captioned_images")
    sources = [source for source in (read, *(made.get("source") for made in run.get("made_from") or ())) if source]
    if record["base_model"]["fingerprint"] != FINGERPRINT or not sources:
        return None
    return None if all(source.get("type") == DRAWINGS for source in sources) else language("drawings_only")
