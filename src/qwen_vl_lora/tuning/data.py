"""What is trained on: conversations in their stored form, encoded, without those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.chat import ChatEncoder, EncodedConversation, part_by_length
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.samples.conversations import parse_conversation, row_of
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.tuning.settings import TrainingSettings

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """What is trained on: conversations in their stored form, and where their pictures are."""

    images: ImageStore
    store: FeatureStore
    train: Sequence[Record]
    validation: Sequence[Record]


def encode_split(
    records: Sequence[Record],
    split: str,
    processor: Any,
    sizer: PictureSizer,
    images: ImageStore,
    settings: TrainingSettings,
) -> tuple[list[EncodedConversation], list[EncodedConversation]]:
    """What is short enough, and what is too long."""
    encoder = ChatEncoder(processor, sizer, images)
    encoded = [encoder.encode(parse_conversation(record)) for record in records]
    silent = [item.id for item in encoded if not item.scored.any()]
    if silent:
        raise DataFormatError(
            f"{len(silent)} {split} conversations hold no assistant turn, so nothing in them is scored; "
            f"the first is {silent[0]!r}. Every conversation needs an answer."
        )
    return part_by_length(encoded, settings.max_length, settings.max_share)


def reject_too_long(
    conversations: Sequence[EncodedConversation], max_length: int, images: ImageStore
) -> list[Rejection]:
    """The rows of `left_out_samples`."""
    return [
        Rejection(
            row_of(item.id),
            images.by_sha256(item.images[0]).id if item.images else "",
            "longer_than_max_length",
            f"{item.id} has {len(item.ids)} tokens, {int(item.is_image.sum())} of them its pictures'; "
            f"max_length allows {max_length}. Nothing is cut: it was left out.",
        )
        for item in conversations
    ]


def check_there_is_something(
    train: Sequence[EncodedConversation], validation: Sequence[EncodedConversation], settings: TrainingSettings
) -> None:
    if not train:
        raise DataFormatError("train_conversations is empty. Run data_engineering on a source with more images.")
    if not validation and settings.training_args.eval_strategy != "no":
        raise DataFormatError(
            "validation_conversations is empty, but training_args.eval_strategy is "
            f"`{settings.training_args.eval_strategy}`. Raise split.validation_images and run data_engineering, or "
            "set eval_strategy: 'no'."
        )
