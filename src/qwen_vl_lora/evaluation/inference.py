"""Captions for the user's own pictures: a folder, a table or a single file.

A picture that cannot be used gets a reason instead of a caption. Finished captions are saved as they
come, so a killed run resumes where it stopped.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from tqdm import tqdm

from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.evaluation.generation import GREEDY, Caption, write_captions, write_each
from qwen_vl_lora.evaluation.kept_captions import KeptCaptions
from qwen_vl_lora.evaluation.predictions import YES_OR_NO
from qwen_vl_lora.evaluation.served import ServedCaptioner
from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.features.fast_tower import quicken
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.model.fingerprints import files_sha256
from qwen_vl_lora.model.merging import merged_if_exact
from qwen_vl_lora.model.shipped_base import NOT_FOR_PHOTOGRAPHS, is_shipped
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.artifacts import digest
from qwen_vl_lora.runs.run import THIS_PROCESS, current_run, recorded_work
from qwen_vl_lora.samples.conversations import ask_about
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.named_pictures import Gathered

logger = logging.getLogger(__name__)

COLUMNS = ("image_path", "caption", "reason", "cut")

_BATCHES_PER_NOTE = 4
"""Batches between two saves of finished captions: a killed run repeats at most these, and the one under way."""


class Captioner:
    """A base model with or without an adapter that captions pictures. Loads its weights at the first caption.

    Raises:
        AdapterError: if the adapter was trained on another base.
    """

    def __init__(
        self,
        base_model: BaseModel,
        adapter: Adapter | None,
        settings: Parameters,
        sampling: SamplingParameters = GREEDY,
    ) -> None:
        if adapter is not None:
            adapter.check_base(base_model)
        self.settings = settings
        self.base_model = base_model
        self.adapter = adapter
        self.sampling = sampling

    @functools.cached_property
    def _model(self) -> Any:
        from transformers import PreTrainedModel

        model = self.base_model.load_configured(self.settings, choose_device(self.settings.device))
        if self.adapter is not None:
            model = merged_if_exact(self.adapter.attach(model))
        if isinstance(model, PreTrainedModel):  # PEFT's layers may be in the tower otherwise
            quicken(self.base_model.family.tower_of(model))
        return model

    @functools.cached_property
    def _processor(self) -> Any:
        return self.base_model.load_processor()

    def caption(
        self, images: ImageStore, sha256s: Sequence[str], description: str | None = "captions"
    ) -> list[Caption]:
        """One caption for each picture, in order. `description` labels the progress bar; None shows none."""
        encoder, generation = self._encoder(images), self.settings.generation
        prompts = list(self._prompts(encoder, sha256s))
        return write_captions(
            self._model, self._processor, prompts, encoder.pixels, generation, description, self.sampling
        )

    def written(
        self, images: ImageStore, sha256s: Sequence[str], known: int
    ) -> Iterator[tuple[dict[str, Caption], str]]:
        """Captions of pictures in parts, as they are finished, each with the process that wrote them.

        `settings.cluster` says how many processes share the pictures.
        """
        settings = self.settings
        processes = Processes(settings.cluster, choose_device(settings.device))
        step = settings.generation.batch_size * _BATCHES_PER_NOTE
        if processes.count > 1:
            parts = [sha256s[start : start + step] for start in range(0, len(sha256s), step)]
            write = functools.partial(self.caption, images, description=None)
            for done in processes.in_pieces(write, parts):
                yield dict(zip(parts[done.number], done.result, strict=True)), done.process
            return
        encoder = self._encoder(images)
        prompts = self._prompts(encoder, sha256s)
        each = write_each(self._model, self._processor, prompts, encoder.pixels, settings.generation, self.sampling)
        while part := {sha256s[number]: caption for number, caption in itertools.islice(each, step)}:
            yield part, THIS_PROCESS

    def _encoder(self, images: ImageStore) -> ChatEncoder:
        return ChatEncoder(self._processor, self.settings.image, images)

    def _prompts(self, encoder: ChatEncoder, sha256s: Sequence[str]) -> Iterator[EncodedConversation]:
        for sha256 in sha256s:
            yield encoder.encode_prompt(ask_about(encoder.images.by_sha256(sha256).path, self.settings.prompt))

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
                **({"sampling": self.sampling.model_dump()} if self.sampling.temperature else {}),
                **settings.base_form,
                "device": choose_device(settings.device).type,
                "packages": [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "transformers")],
            }
        )[:16]


def _weights_and_config(adapter: Adapter) -> list[Path]:
    return [adapter.path / "adapter_config.json", adapter.path / "adapter_model.safetensors"]


def choose_captioner(
    base_model: BaseModel, adapter: Adapter | None, settings: Parameters
) -> Captioner | ServedCaptioner:
    """Captions by the servers of `inference.server` if there are any, else by a model in this process.

    Warns of the small base, which cannot caption photographs.
    """
    if is_shipped(base_model, adapter):
        logger.warning(NOT_FOR_PHOTOGRAPHS)
    sampling = settings.inference.sampling
    if not settings.inference.server.addresses:
        return Captioner(base_model, adapter, settings, sampling)
    captioner = ServedCaptioner(base_model, adapter, settings, sampling)
    if (run := current_run()) is not None:
        run.facts["server"] = captioner.facts
    return captioner


def caption_gathered(
    captioner: Captioner | ServedCaptioner,
    gathered: Gathered,
    kept: KeptCaptions,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> pd.DataFrame:
    """Caption the pictures whose captions are not kept yet.

    Args:
        left_out: path → reason of named pictures that are not captioned.

    Returns:
        A row for each named picture, in order: `image_path,caption,reason,cut`.

    Raises:
        ServerError: if a server gave no picture a caption.
    """
    wanted = (picture.sha256 for picture in gathered.named if picture.sha256 and picture.path not in left_out)
    usable = list(dict.fromkeys(wanted))
    missing = [sha256 for sha256 in usable if sha256 not in kept.captions]
    done = len(usable) - len(missing)
    if done:
        logger.info("%d of %d pictures are captioned already.", done, len(usable))
    with (
        recorded_work("caption_pictures", "pictures") as work,
        tqdm(total=len(missing), desc="captions", unit="caption", leave=False, disable=None) as bar,
    ):
        for captions, process in captioner.written(gathered.images, missing, done):
            kept.add(captions)
            work.add(len(captions), process)
            bar.update(len(captions))
    refused = [caption for sha256 in usable if (caption := kept.captions[sha256]).reason]
    if refused and len(refused) == len(usable):
        raise ServerError(f"The server captioned none of {len(usable)} pictures; of the first, {refused[0].reason}.")
    return _table(gathered, kept.captions, left_out, captioner.settings.generation.max_new_tokens)


def _table(
    gathered: Gathered, captions: Mapping[str, Caption], left_out: Mapping[str, str], limit: int
) -> pd.DataFrame:
    """The rows of `caption_gathered`; logs how many have no caption and how many were cut."""
    written = [
        captions[picture.sha256] if picture.sha256 and picture.path not in left_out else None
        for picture in gathered.named
    ]
    reasons = [
        caption.reason if caption else picture.reason or left_out[picture.path]
        for picture, caption in zip(gathered.named, written, strict=True)
    ]
    bad = sum(map(bool, reasons))
    logger.info("%d pictures captioned, %d not (see the column `reason`).", len(reasons) - bad, bad)
    cut = sum(caption is not None and caption.is_cut for caption in written)
    if cut:
        logger.warning("%d captions were cut at generation.max_new_tokens %d (see the column `cut`).", cut, limit)
    return pd.DataFrame(
        {
            "image_path": [picture.path for picture in gathered.named],
            "caption": [caption.text if caption else "" for caption in written],
            "reason": reasons,
            "cut": [YES_OR_NO[caption.is_cut] if caption and not caption.reason else "" for caption in written],
        },
        columns=list(COLUMNS),
    )
