"""Captions of the held-out pictures by base, tuned model and contenders, from one loaded model at a time."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.evaluation.contenders import Side
from qwen_vl_lora.evaluation.generation import Caption, batches_of, write_captions
from qwen_vl_lora.evaluation.kept_captions import KeptCaptions, question_digest
from qwen_vl_lora.evaluation.predictions import SIDES, YES_OR_NO
from qwen_vl_lora.evaluation.served import SERVER, ServedCaptioner
from qwen_vl_lora.exceptions import DataFormatError, ServerError
from qwen_vl_lora.features.inputs import PictureInputs, StoredPictures, choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.inference_parameters import ServerParameters
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.devices import choose_device, usable_dtype
from qwen_vl_lora.model.merging import merged_if_exact
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.artifacts import digest, relative
from qwen_vl_lora.runs.run import current_run, recorded_work
from qwen_vl_lora.runs.surroundings import ARITHMETIC, describe_computing
from qwen_vl_lora.samples.conversations import Conversation, Message, Part, TextPart
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A question about held-out pictures, with all its references."""

    conversation: Conversation
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        """The last user turn's text."""
        asked = [parts for role, parts in self.conversation.turns if role == "user"][-1]
        return _text(asked)


def group_questions(conversations: Sequence[Conversation]) -> list[Question]:
    """Merge conversations that differ only in the last answer into one question with all its references.

    Raises:
        DataFormatError: if a conversation does not end with an answer.
    """
    answers: dict[tuple[Message, ...], list[str]] = {}
    first: dict[tuple[Message, ...], Conversation] = {}
    for conversation in conversations:
        role, answer = conversation.turns[-1]
        if role != "assistant":
            raise DataFormatError(
                f"Test conversation {conversation.id!r} does not end with an assistant turn, so it has no reference to "
                "compare with. Add the answer, or remove the conversation."
            )
        asked = conversation.turns[:-1]
        first.setdefault(asked, conversation)
        answers.setdefault(asked, []).append(_text(answer))
    return [Question(first[asked], tuple(answers[asked])) for asked in answers]


def compare_captions(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    store: FeatureStore,
    conversations: Sequence[Conversation],
    settings: Parameters,
    folder: Path | None = None,
    contenders: Sequence[Side] = (),
) -> pd.DataFrame:
    """Captions of base and tuned model for held-out conversations, by as many processes as `settings.cluster` says.

    `scoring.by_server` names a side whose captions the servers of `inference.server` write instead.

    Args:
        folder: of kept captions, which are not written again; None writes all and keeps none.

    Returns:
        A table with one row for each question: the columns of `predictions.COLUMNS` and `predictions.CUT_COLUMNS`,
        then those of each contender.

    Raises:
        AdapterError: if the adapter was trained on another base.
        ServerError: if a server is gone, or leaves a picture without caption.
    """
    adapter.check_base(base_model)
    questions = group_questions(conversations)
    served = {settings.scoring.by_server: settings.inference.server}
    sides = [
        Side("base", base_model, None, served.get("base")),
        Side("tuned", base_model, adapter, served.get("tuned")),
        *contenders,
    ]
    captions = caption_sides(sides, [question.conversation for question in questions], images, store, settings, folder)
    return _table(questions, images, captions)


def caption_sides(
    sides: Sequence[Side],
    asked: Sequence[Conversation],
    images: ImageStore,
    store: FeatureStore,
    settings: Parameters,
    folder: Path | None,
) -> dict[str, list[Caption]]:
    """Answers to all questions, in order, by the name of a side. Raises as `compare_captions`."""
    names = [question_digest(conversation, images) for conversation in asked]
    servers = {side.name: _connect(side, side.server, settings) for side in sides if side.server is not None}
    writer = SideWriter(sides, images, store, settings, asked)
    keys = [servers[side.name].key if side.name in servers else writer.key(side) for side in sides]
    kept = [KeptCaptions(folder, key, names) for key in keys]
    _note(sides, kept, servers)
    missing = [[place for place, name in enumerate(names) if name not in captions.captions] for captions in kept]
    here = [number for number, side in enumerate(sides) if side.name not in servers]
    pieces = [piece for number in here for piece in writer.pieces(number, missing[number])]
    with (
        recorded_work("generate_captions", "captions") as work,
        tqdm(total=sum(map(len, missing)), desc="captions", unit="caption", leave=False, disable=None) as bar,
    ):
        for done in Processes(settings.cluster, choose_device(settings.device)).in_pieces(writer, pieces):
            piece, written = pieces[done.number], done.result
            kept[piece.side].add({names[place]: text for place, text in zip(piece.places, written, strict=True)})
            work.add(len(written), done.process)
            bar.update(len(written))
        for captions, places, side in zip(kept, missing, sides, strict=True):
            if side.name in servers:
                unanswered = {names[place]: asked[place] for place in places}
                for answers in servers[side.name].answered(images, unanswered.items(), len(captions.captions)):
                    captions.add(answers)
                    work.add(len(answers), SERVER)
                    bar.update(len(answers))
    _require_all(kept, len(asked))
    for captions, side in zip(kept, sides, strict=True):
        if side.name in servers:  # the model behind a name may be another one tomorrow
            captions.discard()
    return {side.name: [captions.captions[name] for name in names] for side, captions in zip(sides, kept, strict=True)}


def _connect(side: Side, server: ServerParameters, settings: Parameters) -> ServedCaptioner:
    inference = settings.inference.model_copy(update={"server": server})
    return ServedCaptioner(side.base_model, side.adapter, settings.model_copy(update={"inference": inference}))


def _note(sides: Sequence[Side], kept: Sequence[KeptCaptions], servers: Mapping[str, ServedCaptioner]) -> None:
    """Log and record which captions are not written again, and which servers write."""
    facts: dict[str, Any] = {}
    for side, captions in zip(sides, kept, strict=True):
        taken, who = len(captions.captions), servers.get(side.name)
        if taken and captions.file is not None:
            logger.info("%d captions of %s are taken from %s.", taken, side.name, relative(captions.file, Path.cwd()))
        server = {} if who is None else {"server": who.facts}
        facts[side.name] = {"key": captions.key, "taken": taken, **side.facts, **server}
    if (run := current_run()) is not None:
        run.facts["captions"] = facts


def _require_all(kept: Sequence[KeptCaptions], num_questions: int) -> None:
    """Raises: ServerError if a picture has no caption."""
    refused = [caption.reason for side in kept for caption in side.captions.values() if caption.reason]
    if refused:
        raise ServerError(
            f"The server gave {len(refused)} of {num_questions} held-out pictures no caption, so the sides cannot be "
            f"compared; of the first, {refused[0]}. Correct that and run evaluation again."
        )


class Piece(NamedTuple):
    """One batch of questions for one side.

    Attributes:
        side: its place among the sides.
        places: of the questions.
    """

    side: int
    places: tuple[int, ...]
    prompts: list[EncodedConversation]


class SideWriter:
    """Writes captions of each side with a model in this process. It can be pickled until its first caption.

    One model is in memory: the base generates first, then an adapter is attached. Disabling an adapter afterwards
    would not restore the base: trained biases stay, and `init_lora_weights: pissa` changes its weights.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        images: ImageStore,
        store: FeatureStore,
        settings: Parameters,
        asked: Sequence[Conversation],
    ) -> None:
        self._sides = sides
        self._images = images
        self._store = store
        self._settings = settings
        self._asked = asked
        self._loaded: tuple[int, Any] | None = None
        self._read: dict[str, tuple[ChatEncoder, PictureInputs]] = {}

    def pieces(self, number: int, missing: Sequence[int]) -> list[Piece]:
        """The batches of a side with a missing caption.

        They are those of all questions, so that what resumes computes the same bits.
        """
        if not missing:
            return []
        encoder, _ = self._inputs(self._sides[number])
        prompts = [encoder.encode_prompt(conversation) for conversation in self._asked]
        batches = batches_of(prompts, self._settings.generation.batch_size)
        wanted = set(missing)
        return [
            Piece(number, tuple(batch), [prompts[place] for place in batch])
            for batch in batches
            if not wanted.isdisjoint(batch)
        ]

    def __call__(self, piece: Piece) -> list[Caption]:
        """Captions of the piece's prompts, in order."""
        encoder, pictures = self._inputs(self._sides[piece.side])
        model = self._model_of(piece.side)
        return write_captions(model, encoder.processor, piece.prompts, pictures, self._settings.generation, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is quicker made again than pickled."""
        return {**vars(self), "_read": {}}

    def key(self, side: Side) -> str:
        """Digest (16 hex digits) of everything that determines the side's captions besides their questions."""
        settings, adapter = self._settings, side.adapter
        device = choose_device(settings.device)
        computing = describe_computing(device.type)
        parts = ("device",) if device.type == "cuda" else ("device", "cpu", "cpu_capability")
        _, pictures = self._inputs(side)
        packages = ("torch", "transformers", "peft", *(["bitsandbytes"] if settings.is_quantized else []))
        return digest(
            {
                "arithmetic": ARITHMETIC,
                "base_model": side.base_model.fingerprint,
                "adapter": None if adapter is None else [adapter.config_sha256, adapter.weights_sha256],
                "image": settings.image.size,
                "pictures": pictures.features.key if isinstance(pictures, StoredPictures) else "pixels",
                "generation": settings.generation.model_dump(),
                **settings.base_form,
                "threads": Processes(settings.cluster, device).threads,
                **{part: computing[part] for part in parts},
                "packages": [f"{name}=={importlib.metadata.version(name)}" for name in packages],
            }
        )[:16]

    def _inputs(self, side: Side) -> tuple[ChatEncoder, PictureInputs]:
        """What turns questions into prompts, and stored features if they are there for every picture, else pixels."""
        if side.name not in self._read:
            settings = self._settings
            encoder = ChatEncoder(side.base_model.load_processor(), settings.image, self._images)
            dtype = usable_dtype(settings.training_args.dtype, choose_device(settings.device))
            pictures = choose_pictures(side.vision or settings.vision, side.base_model, encoder, self._store, dtype)
            if isinstance(pictures, StoredPictures) and pictures.features.missing(self._shown()):
                logger.info("No features are stored for the picture size of %s; it sees pixels.", side.name)
                pictures = encoder.pixels
            self._read[side.name] = encoder, pictures
        return self._read[side.name]

    def _shown(self) -> list[str]:
        return [self._images.by_path(path).sha256 for conversation in self._asked for path in conversation.image_paths]

    def _model_of(self, number: int) -> Any:
        if self._loaded is not None and self._loaded[0] == number:
            return self._loaded[1]
        side = self._sides[number]
        before, model = (None, None) if self._loaded is None else (self._sides[self._loaded[0]], self._loaded[1])
        if before is None or before.adapter is not None or before.base_model != side.base_model:
            self._loaded = model = None  # one model in memory
            gc.collect()
            model = side.base_model.load_configured(self._settings, choose_device(self._settings.device))
        if side.adapter is not None:
            model = merged_if_exact(side.adapter.attach(model))
        self._loaded = number, model
        return model


def _table(questions: Sequence[Question], images: ImageStore, captions: Mapping[str, list[Caption]]) -> pd.DataFrame:
    paths = [next(iter(question.conversation.image_paths), "") for question in questions]
    columns: dict[str, list[str]] = {
        "image_id": [
            images.by_path(path).id if path else question.conversation.id
            for path, question in zip(paths, questions, strict=True)
        ],
        "image_path": paths,
        "prompt": [question.text for question in questions],
        "references": [json.dumps(question.references, ensure_ascii=False) for question in questions],
    }
    for sides in (SIDES, [side for side in captions if side not in SIDES]):
        columns |= {f"{side}_caption": [caption.text for caption in captions[side]] for side in sides}
        columns |= {f"{side}_cut": [YES_OR_NO[caption.is_cut] for caption in captions[side]] for side in sides}
    return pd.DataFrame(columns)


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text.strip() for part in parts if isinstance(part, TextPart))
