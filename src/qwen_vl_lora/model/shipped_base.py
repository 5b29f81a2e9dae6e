"""The small base that comes with the project: known by its fingerprint, and by what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINGERPRINT = "7cc7340a45d92fe7463a68a7489fd41847da0348284085d127607741d3a8d11c"
DRAWINGS = "ScenesDataset"
"""Class of the only source whose pictures this base knows."""

DRAWINGS_ONLY = (
    "The base model is the small one that comes with the project. It knows drawings of coloured shapes only and "
    "cannot caption photographs: such a training shows that your data are read, not how good the captions can be. "
    'For captions take a real base: --env own_captions_qwen --params "captions_file=…,base_model=…".'
)


def note_on_base(record: Mapping[str, Any]) -> str | None:
    """Return `DRAWINGS_ONLY` if an adapter was trained with this base on anything but its drawings.

    Args:
        record: of the adapter; one of an older version may not name the source.
    """
    run = record.get("run", {})
    read = run.get("read", {}).get("captioned_images")
    sources = [source for source in (read, *(made.get("source") for made in run.get("made_from") or ())) if source]
    if record["base_model"]["fingerprint"] != FINGERPRINT or not sources:
        return None
    return None if all(source.get("type") == DRAWINGS for source in sources) else DRAWINGS_ONLY
