"""Captions for the user's own pictures: a folder, a table or a single file.

A picture that cannot be used gets a reason instead of a caption. Finished captions are saved as they
come, so a killed run resumes where it stopped.
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

from qwen_vl_lora.cluster.work import in_pieces
from qwen_vl_lora.evaluation.generation import Caption, write_captions
from qwen_vl_lora.evaluation.predictions import YES_OR_NO
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.model.fingerprints import files_sha256
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.samples.conversations import ask_about
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.named_pictures import Gathered

logger = logging.getLogger(__name__)

COLUMNS = ("image_path", "caption", "reason", "cut")

_BATCHES_PER_NOTE = 4
"""Batches between two saves of finished captions: a killed run repeats at most these."""


class Captioner:
    """A base model with or without an adapter that captions pictures. Loads its weights at the first caption.

    Raises:
        AdapterError: if the adapter was trained on another base.
    """

    def __init__(self, base_model: BaseModel, adapter: Adapter | None, settings: Parameters) -> None:
        if adapter is not None:
            adapter.check_base(base_model)
        self.settings = settings
        self.base_model = base_model
        self.adapter = adapter

    @functools.cached_property
    def _model(self) -> Any:
        model = self.base_model.load_configured(self.settings, choose_device(self.settings.device))
        return model if self.adapter is None else self.adapter.attach(model)

    @functools.cached_property
    def _processor(self) -> Any:
        return self.base_model.load_processor()

    def caption(
        self, images: ImageStore, sha256s: Sequence[str], description: str | None = "captions"
    ) -> list[Caption]:
        """One caption for each picture, in order. `description` labels the progress bar; None shows none."""
        encoder = ChatEncoder(self._processor, self.settings.image, images)
        asked = [ask_about(images.by_sha256(sha256).path, self.settings.prompt) for sha256 in sha256s]
        prompts = [encoder.encode_prompt(conversation) for conversation in asked]
        generation = self.settings.generation
        return write_captions(self._model, self._processor, prompts, encoder.pixels, generation, description)

    @property
    def key(self) -> str:
        """Digest (16 hex digits) of everything that determines a picture's caption besides its bytes."""
        settings = self.settings
        return digest(
            {
                "base_model": self.base_model.fingerprint,
                "adapter": None if self.adapter is None else files_sha256(_weights_and_config(self.adapter)),
                "prompt": self.settings.prompt.model_dump(include={"user", "system"}),
                "image": settings.image.size,
                "generation": settings.generation.model_dump(exclude={"batch_size"}),
                **settings.base_form,
                "device": choose_device(settings.device).type,
                "packages": [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")],
            }
        )[:16]


def _weights_and_config(adapter: Adapter) -> list[Path]:
    return [adapter.path / "adapter_config.json", adapter.path / "adapter_model.safetensors"]


class CaptionNotes:
    """The finished captions for one key of a `Captioner`, one JSON line each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.captions: dict[str, Caption] = {}
        self.read()

    def read(self) -> None:
        """Load the captions that the file has now."""
        if not self.file.is_file():
            return
        whole = self.file.read_bytes().rpartition(b"\n")[0]  # a kill may have cut the last line
        for line in whole.splitlines():
            note = json.loads(line)
            if "cut" in note:  # an older version wrote none: the picture is captioned again
                self.captions[note["sha256"]] = Caption(note["caption"], note["cut"])
        with self.file.open("rb+") as file:
            file.truncate(len(whole) + 1 if whole else 0)

    def add(self, captions: Mapping[str, Caption]) -> None:
        """Save captions by sha256. They are on disk when this returns."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            for sha256, caption in captions.items():
                note = {"sha256": sha256, "caption": caption.text, "cut": caption.is_cut}
                file.write(json.dumps(note, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.captions.update(captions)


def caption_missing(
    captioner: Captioner, images: ImageStore, missing: Sequence[str], note: Callable[[dict[str, Caption]], None]
) -> None:
    """Caption pictures in parts, by as many processes as `settings.cluster` says, and pass each part to `note`."""
    from tqdm import tqdm

    settings = captioner.settings
    step = settings.generation.batch_size * _BATCHES_PER_NOTE
    parts = [missing[start : start + step] for start in range(0, len(missing), step)]
    write = functools.partial(captioner.caption, images, description=None)
    with tqdm(total=len(missing), desc="captions", unit="caption", leave=False, disable=None) as bar:
        for number, captions in in_pieces(write, parts, settings.cluster, choose_device(settings.device)):
            note(dict(zip(parts[number], captions, strict=True)))
            bar.update(len(captions))


def caption_gathered(captioner: Captioner, gathered: Gathered, notes: CaptionNotes) -> pd.DataFrame:
    """Caption what has no note yet.

    Returns:
        A row for each named picture, in order: `image_path,caption,reason,cut`.
    """
    missing = [sha256 for sha256 in gathered.usable if sha256 not in notes.captions]
    done = len(gathered.usable) - len(missing)
    if done:
        logger.info("%d of %d pictures are captioned already.", done, len(gathered.usable))
    caption_missing(captioner, gathered.images, missing, notes.add)
    written = [notes.captions[picture.sha256] if picture.sha256 else None for picture in gathered.named]
    bad = written.count(None)
    logger.info("%d pictures captioned, %d not usable (see the column `reason`).", len(gathered.named) - bad, bad)
    cut = sum(caption is not None and caption.is_cut for caption in written)
    if cut:
        limit = captioner.settings.generation.max_new_tokens
        logger.warning("%d captions were cut at generation.max_new_tokens %d (see the column `cut`).", cut, limit)
    return pd.DataFrame(
        {
            "image_path": [picture.path for picture in gathered.named],
            "caption": [caption.text if caption else "" for caption in written],
            "reason": [picture.reason for picture in gathered.named],
            "cut": [YES_OR_NO[caption.is_cut] if caption else "" for caption in written],
        },
        columns=list(COLUMNS),
    )
