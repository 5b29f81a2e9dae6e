"""Captions for pictures that belong to no data run: a folder, a table or a single file of the user's.

A picture that cannot be used gets its reason in place of a caption. What was captioned is noted as it
comes, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qwen_vl_lora.features.inputs import PixelPictures
from qwen_vl_lora.modeling.adapter import PICTURE_SIZE, Adapter
from qwen_vl_lora.modeling.base_model import BaseModel, digest
from qwen_vl_lora.modeling.chat import ChatEncoder
from qwen_vl_lora.modeling.devices import choose_device, usable_dtype
from qwen_vl_lora.modeling.fingerprints import files_sha256
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import LauncherParameters
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.launching import count_ranks
from qwen_vl_lora.samples.conversations import ask_about
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.named_pictures import Gathered
from qwen_vl_lora.scoring.generation import write_captions
from qwen_vl_lora.scoring.settings import CaptionSettings

logger = logging.getLogger(__name__)

COLUMNS = ("image_path", "caption", "reason")
_BATCHES_PER_NOTE = 4
"""Batches between two notes of what is done: a killed run repeats at most these."""


class Captioner:
    """A base model, with an adapter or without, ready to caption pictures. Loads weights at the first caption.

    Raises:
        AdapterError: if the adapter was trained on another base.
    """

    def __init__(self, base_model: BaseModel, adapter: Adapter | None, settings: CaptionSettings) -> None:
        if adapter is not None:
            adapter.check_base(base_model)
        self.settings = settings
        self.base_model = base_model
        self.adapter = adapter

    @functools.cached_property
    def _model(self) -> Any:
        device = choose_device(self.settings.device)
        dtype = usable_dtype(self.settings.dtype, device)
        model = self.base_model.load_model(dtype, device, quantization=self.settings.quantization)
        return model if self.adapter is None else self.adapter.attach(model)

    @functools.cached_property
    def _processor(self) -> Any:
        return self.base_model.load_processor()

    def caption(self, images: ImageStore, sha256s: Sequence[str], description: str = "captions") -> list[str]:
        """One caption for each picture, in order. `description` labels the progress bar."""
        sizer = PictureSizer.for_processor(self._processor, self.settings.image)
        encoder = ChatEncoder(self._processor, sizer, images)
        asked = [ask_about(images.by_sha256(sha256).path, self.settings.prompt) for sha256 in sha256s]
        prompts = [encoder.encode_prompt(conversation) for conversation in asked]
        pictures = PixelPictures(images, self._processor, sizer)
        return write_captions(self._model, self._processor, prompts, pictures, self.settings.generation, description)

    @property
    def key(self) -> str:
        """What decides a picture's caption besides its bytes: 16 hex digits."""
        settings = self.settings
        return digest(
            {
                "base_model": self.base_model.fingerprint,
                "adapter": None if self.adapter is None else files_sha256(_weights_and_config(self.adapter)),
                "prompt": settings.prompt.model_dump(),
                "image": settings.image.model_dump(include=set(PICTURE_SIZE)),
                "generation": settings.generation.model_dump(exclude={"batch_size"}),
                "dtype": settings.dtype,
                "quantization": settings.quantization,
                "device": choose_device(settings.device).type,
                "packages": [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")],
            }
        )[:16]


def _weights_and_config(adapter: Adapter) -> list[Path]:
    return [adapter.path / "adapter_config.json", adapter.path / "adapter_model.safetensors"]


class CaptionNotes:
    """Captions written so far, one JSON line each, for one key of a `Captioner`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.captions: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Take over what the file holds by now."""
        if not self.file.is_file():
            return
        whole = self.file.read_bytes().rpartition(b"\n")[0]  # a kill may have cut the last line
        for line in whole.splitlines():
            note = json.loads(line)
            self.captions[note["sha256"]] = note["caption"]
        with self.file.open("rb+") as file:
            file.truncate(len(whole) + 1 if whole else 0)

    def add(self, captions: Mapping[str, str]) -> None:
        """Note captions by sha256, on disk before this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for sha256, caption in captions.items():
                file.write(json.dumps({"sha256": sha256, "caption": caption}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.captions.update(captions)


def caption_missing(
    captioner: Captioner, images: ImageStore, missing: Sequence[str], note: Callable[[dict[str, str]], None]
) -> None:
    """Caption pictures in parts, and note each part; ranks share every part."""
    step = captioner.settings.generation.batch_size * _BATCHES_PER_NOTE * here.world_size()
    for start in range(0, len(missing), step):
        part = missing[start : start + step]
        label = f"captions {start + 1} to {start + len(part)} of {len(missing)}"
        note(dict(zip(part, captioner.caption(images, part, label), strict=True)))


def caption_gathered(
    captioner: Captioner,
    gathered: Gathered,
    notes: CaptionNotes,
    workspace: Path,
    launcher: LauncherParameters,
) -> pd.DataFrame:
    """Caption what has no note yet.

    Args:
        workspace: where several processes meet.
        launcher: how many processes share it.

    Returns:
        A row for each named picture, in order: `image_path,caption,reason`.
    """
    missing = [sha256 for sha256 in gathered.usable if sha256 not in notes.captions]
    done = len(gathered.usable) - len(missing)
    if done:
        logger.info("%d of %d pictures are captioned already.", done, len(gathered.usable))
    if missing and count_ranks(launcher, choose_device(captioner.settings.device)) > 1:
        from qwen_vl_lora.scoring.launcher import caption_on_ranks

        caption_on_ranks(captioner, gathered.images, missing, notes.file, workspace, launcher)
        notes.read()
    else:
        caption_missing(captioner, gathered.images, missing, notes.add)
    bad = sum(picture.sha256 is None for picture in gathered.named)
    logger.info("%d pictures captioned, %d not usable (see the column `reason`).", len(gathered.named) - bad, bad)
    return pd.DataFrame(
        {
            "image_path": [picture.path for picture in gathered.named],
            "caption": [notes.captions[picture.sha256] if picture.sha256 else "" for picture in gathered.named],
            "reason": [picture.reason for picture in gathered.named],
        },
        columns=list(COLUMNS),
    )
