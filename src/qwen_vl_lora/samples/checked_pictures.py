"""Facts of pictures that were checked, kept until a run has finished, so that a killed run decodes no picture twice.

`<stage>/checked/<key>/` has shards of facts by the sha256 of the pictures' bytes, from any number of processes. The key
covers all that decides whether bytes are accepted.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from dataclasses import asdict
from pathlib import Path

import PIL

from qwen_vl_lora.parameters import ImageParameters
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.run import at_run_end
from qwen_vl_lora.runs.storage import discard, write_whole
from qwen_vl_lora.samples.image_files import DECODING, LOOK_VERSION, ImageFacts

FOLDER = "checked"
_SHARD_PICTURES = 256
_DECODING = (DECODING, LOOK_VERSION)
_DECIDING = ("max_source_pixels", "max_aspect_ratio", "more_formats")


class CheckedPictures:
    """Facts of good pictures. Safe to use from several threads."""

    def __init__(self, stage: Path, limits: ImageParameters) -> None:
        """Read what an unfinished run has left."""
        deciding = {name: getattr(limits, name) for name in _DECIDING}
        self._root = stage / FOLDER
        self._folder = self._root / digest({**deciding, "decoding": _DECODING, "pillow": PIL.__version__})[:16]
        self._lock = threading.Lock()
        self._new: dict[str, ImageFacts] = {}
        self._known: dict[str, ImageFacts] = {}
        for shard in self._folder.glob("*.json"):
            with contextlib.suppress(ValueError, TypeError, AttributeError):  # damaged: its pictures are decoded again
                for sha256, facts in json.loads(shard.read_text(encoding="utf-8")).items():
                    self._known[sha256] = ImageFacts(**{**facts, "look": bytes.fromhex(facts["look"])})

    def get(self, sha256: str) -> ImageFacts | None:
        return self._known.get(sha256)

    def add(self, sha256: str, facts: ImageFacts) -> None:
        """Remember a picture that was decoded; written with others, or by `save`."""
        with self._lock:
            self._new[sha256] = facts
            is_full = len(self._new) >= _SHARD_PICTURES
        if is_full:
            self.save()

    def save(self) -> None:
        """Write the shard of what was added since the last one."""
        with self._lock:
            new, self._new = self._new, {}
        if not new:
            return
        with contextlib.suppress(OSError):  # without their shard the pictures are only decoded once more
            self._folder.mkdir(parents=True, exist_ok=True)
            shard = {sha256: {**asdict(facts), "look": facts.look.hex()} for sha256, facts in new.items()}
            write_whole(self._folder / f"{uuid.uuid4().hex}.json", json.dumps(shard), sync=False)

    def forget_at_end(self) -> None:
        """Remove all facts when the run has finished; at once outside of a run."""
        if not at_run_end(lambda finished: discard(self._root) if finished else None):
            discard(self._root)
