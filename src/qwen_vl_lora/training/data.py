"""Training data: conversations as given, and encoded without those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation, part_by_length
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.conversations import Conversation, Conversations, row_of
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.samples.records import Rejection


@dataclass(frozen=True)
class TrainingData:
    """Training and validation conversations, and the stores of their pictures."""

    images: ImageStore
    store: FeatureStore
    train: Conversations
    validation: Conversations


@dataclass(frozen=True)
class EncodedData:
    """What is trained and validated on.

    Attributes:
        train, validation: conversations that fit in `max_length`.
        left_out: those that are too long.
        prompt: questions and system texts of the training conversations. Samples may have their own, so it is read
            from the conversations and not from the parameters.
    """

    train: list[EncodedConversation]
    validation: list[EncodedConversation]
    left_out: list[Rejection]
    prompt: TrainedPrompt


def encode_data(data: TrainingData, encoder: ChatEncoder, settings: Parameters) -> EncodedData:
    """Encode both splits.

    Raises:
        DataFormatError: if there is nothing to train or to validate on, a conversation has nothing to score, or too
            many are too long.
    """
    train, too_long = _encode_split(data.train, "training", encoder, settings)
    validation, too_long_to_validate = _encode_split(data.validation, "validation", encoder, settings)
    if not train:
        raise DataFormatError("train_conversations is empty. Run data_engineering on a source with more images.")
    if not validation and settings.training_args.eval_strategy != "no":
        raise DataFormatError(
            "validation_conversations is empty, but training_args.eval_strategy is "
            f"`{settings.training_args.eval_strategy}`. Raise split.validation_images and run data_engineering, or "
            "set eval_strategy: 'no'."
        )
    left_out = [_reject(item, settings.max_length, data.images) for item in [*too_long, *too_long_to_validate]]
    ids = {item.id for item in train}
    trained = (conversation for conversation in data.train if conversation.id in ids)
    prompt = TrainedPrompt.of_conversations(trained, override=settings.prompt.override)
    return EncodedData(train, validation, left_out, prompt)


def _encode_split(
    conversations: Sequence[Conversation], split: str, encoder: ChatEncoder, settings: Parameters
) -> tuple[list[EncodedConversation], list[EncodedConversation]]:
    """The encoded conversations that fit in `max_length`, and those that are too long."""
    encoded = [encoder.encode(conversation) for conversation in conversations]
    silent = [item.id for item in encoded if not item.scored.any()]
    if silent:
        raise DataFormatError(
            f"{len(silent)} {split} conversations have no assistant turn, so nothing in them is scored; "
            f"the first is {silent[0]!r}. Every conversation needs an answer."
        )
    return part_by_length(encoded, settings.max_length, settings.quarantine.max_share)


def _reject(item: EncodedConversation, max_length: int, images: ImageStore) -> Rejection:
    """Its row of `left_out_samples`."""
    return Rejection(
        row_of(item.id),
        images.by_sha256(item.images[0]).id if item.images else "",
        "longer_than_max_length",
        f"{item.id} has {len(item.ids)} tokens, {int(item.is_image.sum())} of them its pictures'; "
        f"max_length allows {max_length}. The conversation was left out; nothing is truncated.",
    )
