"""Captions of single pictures by the base and its adapters, word by word.

Models are loaded once and stay. One caption is generated at a time, whoever asks; the others wait. Knows nothing of
the page that shows it. Imports torch when the first caption is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import queue
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.evaluation.settings import asking, changed
from qwen_vl_lora.exceptions import DataFormatError, QwenVLLoraError
from qwen_vl_lora.faults import machine_fault
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.parameters import ImageParameters, Parameters
from qwen_vl_lora.samples.conversations import ask_about
from qwen_vl_lora.samples.image_files import inspect_image
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from qwen_vl_lora.samples.named_pictures import LoosePictures
from qwen_vl_lora.samples.records import RowError

if TYPE_CHECKING:
    from qwen_vl_lora.evaluation.generation import Caption

logger = logging.getLogger(__name__)

GENERATION = ("max_new_tokens", "repetition_penalty")
SAMPLING = ("temperature", "top_p", "seed")
"""Settings of `generation` and `inference.sampling` that a person can change."""


@dataclass(frozen=True)
class Picture:
    """A checked picture.

    Attributes:
        name: as the user knows it: the name of a file, or a path.
        images: holds the picture.
        is_held_out: whether an evaluation measured captions of it.
    """

    name: str
    images: ImageStore
    sha256: str
    is_held_out: bool = False


@dataclass(frozen=True)
class HeldOut:
    """A picture of an evaluation.

    Attributes:
        score: CIDEr of the tuned caption, from 0 to 10.
    """

    picture: Picture
    references: tuple[str, ...]
    score: float


class Written(NamedTuple):
    """A caption so far.

    Attributes:
        caption: whole, once it is finished; None before.
    """

    text: str
    caption: Caption | None = None


def check_picture(data: bytes, name: str, limits: ImageParameters) -> Picture:
    """A picture that a user gives as bytes.

    Raises:
        RowError: with the reason, if it is not usable.
    """
    facts = inspect_image(data, limits)
    sha256 = hashlib.sha256(data).hexdigest()
    entry = ImageEntry(sha256, sha256, "", facts.suffix, facts.width, facts.height, len(data))
    return Picture(PurePath(name).name, LoosePictures([entry], {sha256: data}), sha256)


def read_held_out(predictions: pd.DataFrame, scores: pd.DataFrame, images: ImageStore) -> list[HeldOut]:
    """The pictures of an evaluation, the worst tuned caption first.

    Raises:
        DataFormatError: if the tables are not those of one evaluation.
    """
    rows = [item for item in read_predictions(predictions) if item.image_path]
    measured = dict(zip(scores["image_id"].astype(str), scores["tuned_cider"].astype(float), strict=True))
    found = []
    for item in rows:
        if item.image_id not in measured:
            raise DataFormatError(f"caption_scores has no row for image {item.image_id!r}. Evaluate the adapter again.")
        entry = images.by_path(item.image_path)
        picture = Picture(entry.path, images, entry.sha256, is_held_out=True)
        found.append(HeldOut(picture, item.references, measured[item.image_id]))
    return sorted(found, key=lambda one: one.score)


def in_words(error: BaseException) -> str:
    """What a person is told of an error. One that is not expected goes to the log with its traceback."""
    if isinstance(error, RowError):
        return f"{error.reason}: {error.detail}"
    expected = error if isinstance(error, QwenVLLoraError) else machine_fault(error)
    if expected is not None:
        return str(expected)
    logger.error("The playground met an error.", exc_info=error)
    return f"{type(error).__name__}: {error}. The terminal shows where."


@dataclass
class Tryout:
    """One base and the adapters that were trained on it.

    Attributes:
        adapters: by the name that people choose them by, such as their version.
        settings: the configured ones. They limit picture files, and the base alone uses them.
        params: of every command that is copied, as `name=value`.
        base_options: of a command for the base, such as `--env own`; a version says this for an adapter.
        base_params: likewise, as `name=value`.
    """

    base_model: BaseModel
    adapters: Mapping[str, Adapter]
    settings: Parameters
    params: Sequence[str] = ()
    base_options: Sequence[str] = ()
    base_params: Sequence[str] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _models: dict[tuple[str | None, ...], Any] = field(default_factory=dict, repr=False)
    _attached: dict[str, str] = field(default_factory=dict, repr=False)

    def trained(self, name: str | None) -> Parameters:
        """The settings that an adapter was trained with; of several questions, the most frequent one.

        Args:
            name: of an adapter; None is the base alone, whose settings are the configured ones.
        """
        if name is None:
            return self.settings
        adapter = self.adapters[name]
        settings, prompt = adapter.trained_settings(self.settings), adapter.trained_prompt
        user = prompt.questions.texts[0][0] if prompt.questions else None
        return asking(settings, user, (prompt.systems.texts[0][0] or "") if prompt.systems else None)

    def asked(self, name: str | None, user: str, system: str, given: Mapping[str, Any]) -> Parameters:
        """The settings of `trained` with what a person asks instead.

        Args:
            system: empty is the chat template's own.
            given: values of `image`, `generation` and `inference.sampling`, as in parameters.yml.

        Raises:
            ParameterError: if a value is not valid.
        """
        return asking(changed(self.trained(name), given), user, system)

    def differences(self, name: str | None, settings: Parameters) -> list[str]:
        """How settings differ from the training of an adapter, or from the configured ones for the base alone."""
        trained = self.trained(name)
        said = "configured" if name is None else "trained with"
        sizes = _size(trained.image), _size(settings.image)
        decoding, draws = _pairs(trained.generation, settings.generation, GENERATION), _draws(trained, settings)
        found = [
            *_in_words(said, {"picture size": sizes, **decoding}),
            *_in_words("configured", draws),  # an adapter is trained without drawing words
        ]
        if name is not None:
            asked = self.adapters[name].trained_prompt.differences(settings.prompt)
            return [text.replace(", configured ", ", now ") for text in asked] + found
        texts = {"prompt": "user", "system text": "system"}
        old, new = trained.prompt.model_dump(), settings.prompt.model_dump()
        asked = [
            f"{key}: {said} {old[name]!r}, now {new[name]!r}" for key, name in texts.items() if old[name] != new[name]
        ]
        return asked + found

    def command(self, name: str | None, picture: Picture, settings: Parameters) -> str:
        """The command that writes the same caption on a terminal."""
        words = ["qwen-vl-lora", "caption", picture.name, "--adapter", name or "none"]
        if name is None:
            words += self.base_options
        old = self.trained(name)
        several = name is not None and self.adapters[name].trained_prompt.choose() is None
        if several or settings.prompt.user != old.prompt.user:
            words += ["--prompt", settings.prompt.user]
        if several or settings.prompt.system != old.prompt.system:
            words += ["--system", settings.prompt.system or ""]
        changes = [f"{key}={json.dumps(value)}" for key, value in _changes(old, settings).items()]
        if given := ",".join([*self.params, *(self.base_params if name is None else ()), *changes]):
            words += ["--params", given]
        return shlex.join(words)

    def warm_up(self, names: Sequence[str]) -> None:
        """Load the base and the adapters, so that the first caption does not wait."""
        try:
            with self._lock:
                for name in names:
                    self._attach(name)
                if not names:
                    self._load(self.settings, None)
                _ = self._processor
        except Exception as error:  # the first caption meets and shows it again
            logger.error("%s", in_words(error))

    def caption(self, name: str | None, picture: Picture, settings: Parameters) -> Iterator[Written]:
        """Write a caption. Closing the iterator ends the generation.

        Args:
            name: of an adapter; None is the base.
            settings: from `asked`, of this adapter, or for the base of the adapter beside it.

        Yields:
            The text so far, and at last the whole caption.

        Raises:
            QwenVLLoraError, or whatever else generation raises.
        """
        told: queue.Queue[Any] = queue.Queue()
        stop = threading.Event()
        writer = threading.Thread(target=self._write, args=(name, picture, settings, told, stop), daemon=True)
        writer.start()
        text = ""
        try:
            while not isinstance(said := told.get(), BaseException):
                if isinstance(said, tuple):
                    yield Written(said[0], said)  # type: ignore[arg-type]
                    return
                text += said or ""  # None is the streamer's own mark of the end
                yield Written(text)
            raise said
        finally:
            stop.set()
            writer.join()

    def _write(
        self, name: str | None, picture: Picture, settings: Parameters, told: queue.Queue[Any], stop: threading.Event
    ) -> None:
        """Put the words of a caption into a queue as they come, then the caption or an error."""
        try:
            with self._lock, self._active(name, settings) as model:
                told.put(self._generate(model, picture, settings, told, stop))
        except BaseException as error:
            told.put(error.with_traceback(None) if machine_fault(error) else error)  # its frames hold tensors
            _free_memory()

    def _generate(
        self, model: Any, picture: Picture, settings: Parameters, told: queue.Queue[Any], stop: threading.Event
    ) -> Caption:
        import torch
        from transformers import TextIteratorStreamer

        from qwen_vl_lora.evaluation.generation import write_batch
        from qwen_vl_lora.model.chat import ChatEncoder

        processor = self._processor
        encoder = ChatEncoder(processor, settings.image, picture.images)
        path = picture.images.by_sha256(picture.sha256).path
        prompt = encoder.encode_prompt(ask_about(path, settings.prompt))
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.text_queue = told

        def is_over(ids: Any, _: Any, **__: Any) -> Any:
            return torch.full((ids.shape[0],), stop.is_set(), device=ids.device, dtype=torch.bool)

        watching = {"streamer": streamer, "stopping_criteria": [is_over]}
        sampling = settings.inference.sampling
        return write_batch(model, processor, [prompt], encoder.pixels, settings.generation, sampling, **watching)[0]

    @contextmanager
    def _active(self, name: str | None, settings: Parameters) -> Iterator[Any]:
        """The model that writes with one adapter, or as the base."""
        from peft import PeftModel

        if name is not None:
            model = self._attach(name)
            model.set_adapter(self._attached[name], inference_mode=True)
            yield model
        elif isinstance(model := self._load(settings, None), PeftModel):
            with model.disable_adapter():
                yield model
        else:
            yield model

    def _load(self, settings: Parameters, alone: str | None) -> Any:
        """The model in the form of the settings; for an adapter that changes its base, one of its own."""
        key = (*settings.base_form.values(), alone)
        if key not in self._models:
            self._models[key] = self.base_model.load_configured(settings, choose_device(self.settings.device))
        return self._models[key]

    def _attach(self, name: str) -> Any:
        adapter, settings = self.adapters[name], self.trained(name)
        alone = None if adapter.keeps_base else name
        model = self._load(settings, alone)
        if name not in self._attached:
            adapter.check_base(self.base_model)
            inner = f"adapter_{len(self._attached)}"
            model = adapter.attach(model, inner)
            self._models[*settings.base_form.values(), alone] = model
            self._attached[name] = inner
        return model

    @functools.cached_property
    def _processor(self) -> Any:
        return self.base_model.load_processor()


def _changes(old: Parameters, new: Parameters) -> dict[str, Any]:
    """The keys of `image`, `generation` and `inference.sampling` that differ, as `--params` names them."""
    blocks = {
        "image": {key: (value, new.image.size[key]) for key, value in old.image.size.items()},
        "generation": _pairs(old.generation, new.generation, GENERATION),
        "inference.sampling": _draws(old, new),
    }
    pairs = {f"{block}.{key}": pair for block, keys in blocks.items() for key, pair in keys.items()}
    return {key: ours for key, (theirs, ours) in pairs.items() if theirs != ours}


def _draws(old: Parameters, new: Parameters) -> dict[str, tuple[Any, Any]]:
    return _pairs(old.inference.sampling, new.inference.sampling, SAMPLING)


def _pairs(old: Any, new: Any, names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    return {name: (getattr(old, name), getattr(new, name)) for name in names}


def _in_words(said: str, pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{key}: {said} {theirs}, now {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]


def _size(image: ImageParameters) -> str:
    if image.resized_height:
        return f"{image.resized_height} x {image.resized_width} px"
    return f"{image.min_pixels} to {image.max_pixels} pixels"


def _free_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
