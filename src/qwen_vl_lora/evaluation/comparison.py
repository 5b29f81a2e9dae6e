"""Base and tuned captions of the held-out pictures, from one loaded model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from qwen_vl_lora.cluster.work import in_pieces
from qwen_vl_lora.evaluation.generation import Caption, batches_of, write_captions
from qwen_vl_lora.evaluation.predictions import YES_OR_NO
from qwen_vl_lora.evaluation.served import ServedCaptioner
from qwen_vl_lora.exceptions import DataFormatError, ServerError
from qwen_vl_lora.features.inputs import PictureInputs, StoredPictures, choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.devices import choose_device, usable_dtype
from qwen_vl_lora.model.merging import merged_if_exact
from qwen_vl_lora.parameters import Parameters
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
) -> pd.DataFrame:
    """Captions of base and tuned model for held-out conversations, by as many processes as `settings.cluster` says.

    `scoring.by_server` names a side whose captions the servers of `inference.server` write instead.

    Returns:
        A table with one row for each question: the columns of `predictions.COLUMNS` and `predictions.CUT_COLUMNS`.

    Raises:
        AdapterError: if the adapter was trained on another base.
        ServerError: if a server is gone, or leaves a picture without caption.
    """
    adapter.check_base(base_model)
    questions = group_questions(conversations)
    shown = [images.by_path(path).sha256 for question in questions for path in question.conversation.image_paths]
    writer = BothSides(base_model, adapter, images, store, settings, shown)
    prompts = [writer.encoder.encode_prompt(question.conversation) for question in questions]
    batches = batches_of(prompts, settings.generation.batch_size)
    served = {"base": False, "tuned": True}.get(settings.scoring.by_server or "")
    pieces = [
        Piece(is_tuned, tuple(batch), [prompts[index] for index in batch])
        for is_tuned in (False, True)
        if is_tuned != served
        for batch in batches
    ]
    captions: dict[bool, dict[int, Caption]] = {False: {}, True: {}}
    with tqdm(total=2 * len(prompts), desc="base and tuned captions", unit="caption", leave=False, disable=None) as bar:
        for number, written in in_pieces(writer, pieces, settings.cluster, choose_device(settings.device)):
            piece = pieces[number]
            captions[piece.is_tuned].update(zip(piece.indices, written, strict=True))
            bar.update(len(written))
        if served is not None:
            captioner = ServedCaptioner(base_model, adapter if served else None, settings)
            for answers in captioner.answered(images, enumerate(question.conversation for question in questions)):
                captions[served].update(answers)
                bar.update(len(answers))
    if refused := [caption.reason for side in captions.values() for caption in side.values() if caption.reason]:
        raise ServerError(
            f"The server gave {len(refused)} of {len(questions)} held-out pictures no caption, so the sides cannot be "
            f"compared; of the first, {refused[0]}. Correct that and run evaluation again."
        )
    base, tuned = ([captions[side][index] for index in range(len(prompts))] for side in (False, True))
    return _table(questions, images, base, tuned)


class Piece(NamedTuple):
    """One batch of questions for one side.

    Attributes:
        indices: of the questions.
    """

    is_tuned: bool
    indices: tuple[int, ...]
    prompts: list[EncodedConversation]


class BothSides:
    """Writes captions with the base model and with the tuned one. It can be pickled until its first caption.

    One model is in memory: the base generates first, then the adapter is attached. Disabling an adapter afterwards
    would not restore the base: trained biases stay, and `init_lora_weights: pissa` changes its weights.
    """

    def __init__(
        self,
        base_model: BaseModel,
        adapter: Adapter,
        images: ImageStore,
        store: FeatureStore,
        settings: Parameters,
        shown: Sequence[str],
    ) -> None:
        self._base_model = base_model
        self._adapter = adapter
        self._images = images
        self._store = store
        self._settings = settings
        self._shown = shown
        self._model: Any = None
        self._is_tuned = False

    def __call__(self, piece: Piece) -> list[Caption]:
        """Captions of the piece's prompts, in order."""
        model = self._model_of(piece.is_tuned)
        generation = self._settings.generation
        return write_captions(model, self.encoder.processor, piece.prompts, self._pictures, generation, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is quicker made again than pickled."""
        made = ("encoder", "_pictures")
        return {name: value for name, value in vars(self).items() if name not in made}

    @cached_property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(self._base_model.load_processor(), self._settings.image, self._images)

    @cached_property
    def _pictures(self) -> PictureInputs:
        """Stored features if they are there for every shown picture, else pixels."""
        settings = self._settings
        dtype = usable_dtype(settings.training_args.dtype, choose_device(settings.device))
        pictures = choose_pictures(settings.vision, self._base_model, self.encoder, self._store, dtype)
        if isinstance(pictures, StoredPictures) and pictures.features.missing(self._shown):
            logger.info("No features are stored for the adapter's picture size; its captions are written from pixels.")
            return self.encoder.pixels
        return pictures

    def _model_of(self, is_tuned: bool) -> Any:
        if self._model is None or (self._is_tuned and not is_tuned):
            self._model = self._base_model.load_configured(self._settings, choose_device(self._settings.device))
            self._is_tuned = False
        if is_tuned and not self._is_tuned:
            self._model, self._is_tuned = merged_if_exact(self._adapter.attach(self._model)), True
        return self._model


def _table(
    questions: Sequence[Question], images: ImageStore, base: Sequence[Caption], tuned: Sequence[Caption]
) -> pd.DataFrame:
    paths = [next(iter(question.conversation.image_paths), "") for question in questions]
    return pd.DataFrame(
        {
            "image_id": [
                images.by_path(path).id if path else question.conversation.id
                for path, question in zip(paths, questions, strict=True)
            ],
            "image_path": paths,
            "prompt": [question.text for question in questions],
            "references": [json.dumps(question.references, ensure_ascii=False) for question in questions],
            "base_caption": [caption.text for caption in base],
            "tuned_caption": [caption.text for caption in tuned],
            "base_cut": [YES_OR_NO[caption.is_cut] for caption in base],
            "tuned_cut": [YES_OR_NO[caption.is_cut] for caption in tuned],
        }
    )


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text.strip() for part in parts if isinstance(part, TextPart))
