"""Training data: conversations as given, and tokenised without those that are too long."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.conversations import Conversations, row_of
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.training.tokenised import TokenisedSamples, tokenise

logger = logging.getLogger(__name__)

_NAMED = 20
"""Conversations that a warning names."""


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

    train: TokenisedSamples
    validation: TokenisedSamples
    left_out: list[Rejection]
    prompt: TrainedPrompt


def encode_data(data: TrainingData, base_model: BaseModel, settings: Parameters, root: Path) -> EncodedData:
    """Tokenise both splits, or read what an earlier run tokenised.

    Args:
        root: folder of all tokenised samples of the recipe.

    Raises:
        DataFormatError: if there is nothing to train or to validate on, a conversation has nothing to score, or too
            many are too long.
    """
    encoder = functools.cache(lambda: ChatEncoder(base_model.load_processor(), settings.image, data.images))
    splits = [
        tokenise(split, base_model, settings.image.size, root, encoder) for split in (data.train, data.validation)
    ]
    max_length, max_share = settings.max_length, settings.quarantine.max_share
    (train, too_long), (validation, also_too_long) = (part_by_length(one, max_length, max_share) for one in splits)
    if not train:
        raise DataFormatError("train_conversations is empty. Run data_engineering on a source with more images.")
    if not validation and settings.training_args.eval_strategy != "no":
        raise DataFormatError(
            "validation_conversations is empty, but training_args.eval_strategy is "
            f"`{settings.training_args.eval_strategy}`. Raise split.validation_images and run data_engineering, or "
            "set eval_strategy: 'no'."
        )
    left_out = [_reject(item, max_length, data.images) for part in (too_long, also_too_long) for item in part]
    return EncodedData(train, validation, left_out, train.prompt(override=settings.prompt.override))


def part_by_length(
    samples: TokenisedSamples, max_length: int, max_share: float
) -> tuple[TokenisedSamples, TokenisedSamples]:
    """The samples that fit in `max_length` tokens, and those that are too long. None is truncated.

    Raises:
        DataFormatError: if the share of those that do not fit is above `max_share`.
    """
    lengths = samples.lengths
    kept, long = (samples.choose(np.flatnonzero(part)) for part in (lengths <= max_length, lengths > max_length))
    if not long:
        return kept, long
    most = int(lengths.argmax())
    facts = (
        f"{len(long)} of {len(samples)} conversations are longer than max_length {max_length} tokens; the longest is "
        f"{samples.id_of(most)!r} with {lengths[most]}."
    )
    if len(long) > max_share * len(samples):
        raise DataFormatError(
            f"{facts} That is more than quarantine.max_share {max_share:.0%}. Raise max_length to "
            f"{lengths[most]}, lower the image size, or shorten those texts: nothing is cut."
        )
    named = ", ".join(map(long.id_of, range(min(_NAMED, len(long)))))
    logger.warning("%s They are left out of training and listed in left_out_samples: %s.", facts, named)
    return kept, long


def _reject(item: EncodedConversation, max_length: int, images: ImageStore) -> Rejection:
    """Its row of `left_out_samples`."""
    return Rejection(
        row_of(item.id),
        images.by_sha256(item.images[0]).id if item.images else "",
        "longer_than_max_length",
        f"{item.id} has {len(item.ids)} tokens, {int(item.is_image.sum())} of them its pictures'; "
        f"max_length allows {max_length}. The conversation was left out; nothing is truncated.",
    )
