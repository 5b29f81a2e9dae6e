"""Base and tuned captions of the held-out pictures, from one loaded model."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.features.inputs import PictureInputs, PixelPictures, StoredPictures, choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.chat import ChatEncoder
from qwen_vl_lora.modeling.devices import choose_device, usable_dtype
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import LauncherParameters
from qwen_vl_lora.ranks.launching import count_ranks
from qwen_vl_lora.samples.conversations import Conversation, Message, Part, TextPart, parse_conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.scoring.generation import write_captions
from qwen_vl_lora.scoring.settings import CaptionSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What is asked about held-out pictures once, however many references answer it."""

    conversation: Conversation
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        """The last user turn's text."""
        asked = [parts for role, parts in self.conversation.turns if role == "user"][-1]
        return _text(asked)


def group_questions(conversations: Sequence[Conversation]) -> list[Question]:
    """Conversations with the same pictures and words up to the last answer, as one question with all its answers.

    Raises:
        DataFormatError: if a conversation does not end with an answer to compare with.
    """
    answers: dict[tuple[Message, ...], list[str]] = {}
    first: dict[tuple[Message, ...], Conversation] = {}
    for conversation in conversations:
        role, answer = conversation.turns[-1]
        if role != "assistant":
            raise DataFormatError(f"Test conversation {conversation.id!r} ends without an assistant turn to compare.")
        asked = conversation.turns[:-1]
        first.setdefault(asked, conversation)
        answers.setdefault(asked, []).append(_text(answer))
    return [Question(first[asked], tuple(answers[asked])) for asked in answers]


def compare_captions(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    store: FeatureStore,
    records: Sequence[dict[str, Any]],
    settings: CaptionSettings,
    workspace: Path | None = None,
    launcher: LauncherParameters | None = None,
) -> pd.DataFrame:
    """Captions before and after for held-out conversations.

    One model in memory: the base writes first, before the adapter is put on it. Switched off afterwards, an adapter
    may leave something behind: trained biases, or weights that `init_lora_weights: pissa` took out of the base.

    Args:
        workspace: where several processes meet; needed with `launcher` alone.
        launcher: how many processes share it; None writes the captions in this one.

    Returns:
        One row for each question: `image_id,image_path,prompt,references,base_caption,tuned_caption`.

    Raises:
        AdapterError: if the adapter was trained on another base.
    """
    adapter.check_base(base_model)
    device = choose_device(settings.device)
    if launcher is not None and workspace is not None and count_ranks(launcher, device) > 1:
        from qwen_vl_lora.scoring.launcher import compare_on_ranks

        return compare_on_ranks(base_model, adapter, images, store, records, settings, workspace, launcher)
    questions = group_questions([parse_conversation(record) for record in records])
    processor = base_model.load_processor()
    sizer = PictureSizer.for_processor(processor, settings.image)
    encoder = ChatEncoder(processor, sizer, images)
    prompts = [encoder.encode_prompt(question.conversation) for question in questions]
    settings = replace(settings, dtype=usable_dtype(settings.dtype, device))
    pictures = _pictures(questions, base_model, images, store, settings, processor, sizer)
    model = base_model.load_model(settings.dtype, device, quantization=settings.quantization)
    base = write_captions(model, processor, prompts, pictures, settings.generation, "base captions")
    tuned_model = adapter.attach(model)
    tuned = write_captions(tuned_model, processor, prompts, pictures, settings.generation, "tuned captions")
    return _table(questions, images, base, tuned)


def _pictures(
    questions: Sequence[Question],
    base_model: BaseModel,
    images: ImageStore,
    store: FeatureStore,
    settings: CaptionSettings,
    processor: Any,
    sizer: PictureSizer,
) -> PictureInputs:
    """Stored features, or pixels where none are stored at the size that the adapter was trained at."""
    chosen = choose_pictures(settings.vision, base_model, store, images, settings.dtype, processor, sizer)
    shown = [images.by_path(path).sha256 for question in questions for path in question.conversation.image_paths]
    if isinstance(chosen, StoredPictures) and chosen.features.missing(shown):
        logger.info("No features are stored for the adapter's picture size; its captions are written from pixels.")
        return PixelPictures(images, processor, sizer)
    return chosen


def _table(
    questions: Sequence[Question], images: ImageStore, base: Sequence[str], tuned: Sequence[str]
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
            "base_caption": base,
            "tuned_caption": tuned,
        }
    )


def _text(parts: Sequence[Part]) -> str:
    return " ".join(part.text.strip() for part in parts if isinstance(part, TextPart))
