"""One process's part of a training: from conversations to a staged adapter directory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qwen_vl_lora.cluster import here
from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.features.inputs import blanked, choose_pictures
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.model.lora import add_adapter, check_vision_is_untouched, trainable_parameters
from qwen_vl_lora.model.model_card import write_adapter_card
from qwen_vl_lora.model.parent import ParentAdapter
from qwen_vl_lora.pages.language import choose_language
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.training.arguments import check_schedule, training_arguments
from qwen_vl_lora.training.batch_size import choose_batch_size
from qwen_vl_lora.training.collator import ForwardPass, RowCollator, to_device
from qwen_vl_lora.training.data import EncodedData, TrainingData
from qwen_vl_lora.training.loop import LOG_COLUMNS, OnRow, TrainingLoop, TrainingState, count_steps
from qwen_vl_lora.training.memory import answered_shortage
from qwen_vl_lora.training.movement import Movement
from qwen_vl_lora.training.row_mask import check_packing
from qwen_vl_lora.training.rows import check_rows
from qwen_vl_lora.training.sharding import whole_adapter

logger = logging.getLogger(__name__)

Record = dict[str, Any]

MAX_POINTS = 200
"""Rows of the log that an adapter's record keeps of each loss."""


@dataclass(frozen=True)
class FittedAdapter:
    """What training gives back.

    Attributes:
        directory: staged PEFT directory, to be published by rename.
        log: rows of `training_log`.
        summary: `training_summary`.
        preview: `batch_preview`.
        left_out: what was too long to train or to validate on.
    """

    directory: Path
    log: list[Record]
    summary: Record
    preview: Record
    left_out: list[Rejection]

    def log_table(self) -> pd.DataFrame:
        """`training_log`, with every column also where nothing was measured."""
        return pd.DataFrame(self.log, columns=list(LOG_COLUMNS))


def train(
    base_model: BaseModel,
    data: TrainingData,
    encoded: EncodedData,
    settings: Parameters,
    parent: ParentAdapter | None,
    job_folder: Path,
    checkpoint: Path | None,
    on_row: OnRow | None,
) -> FittedAdapter:
    """This process's part of a training; of several ranks, the first writes and its result counts."""
    device = choose_device(settings.device)
    train = encoded.train
    check_rows(train, settings.rows, base_model.family)
    check_packing(settings.attention, device, base_model.family)
    check_schedule(training_arguments(settings), count_steps(train, settings))
    if here.is_first():
        logger.info(encoded.prompt.sentence())

    dtype = settings.training_args.dtype
    here.note("loading the base model")
    encoder = ChatEncoder(base_model.load_processor(), settings.image, data.images)
    pictures = choose_pictures(settings.vision, base_model, encoder, data.store, dtype)
    model = _load_trainable(base_model, parent, settings, device)
    collator = RowCollator(encoder, pictures, settings.attention)
    size = _batch_size(model, train, collator, settings, job_folder)
    loop = TrainingLoop(model, train, encoded.validation, collator, settings, size, job_folder, on_row)
    first, movement = loop.batches.first(), Movement(model)
    with answered_shortage(base_model.geometry, train, settings, size):
        check_pictures_reach_the_model(model, first, device)
        state = loop.run(checkpoint)
    check_vision_is_untouched(model, settings.vision)

    weights = whole_adapter(model)
    log = state.rows()
    summary = {
        **_summary(state, log, train),
        "trainable_parameters": trainable_parameters(model),
        "device": str(device),
        "dtype": dtype,
        "ranks": here.world_size(),
        "resumed_from": checkpoint.name if checkpoint else None,
        "left_out_too_long": len(data.train) - len(train),
        **(movement.check(model, weights, state.highest_rate, loop.reached) if here.is_first() else {}),
    }
    told = {**summary, "curve": thin_curve(log)}
    record = {**adapter_record(base_model, data, encoded, settings, parent), "training": told}
    directory = job_folder / "adapter"
    if here.is_first():
        stage_adapter(model, directory, record, weights)
        answers = (record["conversations"][-1]["value"] for record in data.train.records)
        write_adapter_card(directory, base_model, choose_language(settings.report.language, answers))
    return FittedAdapter(directory, log, summary, preview_batch(first, encoder.processor), encoded.left_out)


def _load_trainable(
    base_model: BaseModel, parent: ParentAdapter | None, settings: Parameters, device: torch.device
) -> Any:
    """The base with a fresh adapter around it, or with the weights of the one to go on from."""
    model = base_model.load_configured(settings, device, attention=settings.attention)
    model = add_adapter(model, settings.lora, settings.vision, settings.training_args.seed)
    if settings.vision == "frozen":
        base_model.family.drop_tower(model.get_base_model())  # pictures come as stored features: it would take memory
    if parent is not None:
        parent.load_into(model)
    if settings.training_args.gradient_checkpointing:
        checkpoint_activations(model.get_base_model(), base_model.family, settings.vision)
    return model


def checkpoint_activations(base: Any, family: Family, vision: str) -> None:
    """Recompute the language model's layers in the backward pass, but never a frozen tower's.

    The last layer keeps its activations: its backward comes first, when the memory is there anyway.
    """
    language_model = family.language_model_of(base)
    _enable_checkpointing(language_model)
    language_model.layers[-1].gradient_checkpointing = False
    if vision == "adapted":
        _enable_checkpointing(family.tower_of(base))


def _enable_checkpointing(model: Any) -> None:
    # transformers 5.2x renames it and warns for the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _batch_size(
    model: Any,
    train: Sequence[EncodedConversation],
    collator: RowCollator,
    settings: Parameters,
    job_folder: Path,
) -> int:
    """Captions of one forward pass."""
    size = settings.training_args.per_device_train_batch_size
    if size != "auto":
        return size
    return choose_batch_size(
        model, train, collator, settings.rows, settings.training_args.captions_per_step, job_folder
    )


@torch.no_grad()
def check_pictures_reach_the_model(model: Any, forward: ForwardPass, device: torch.device) -> None:
    """Whether the answer changes with the picture: with a wrong image token it silently does not.

    Raises:
        TrainingError: if the logits are the same for a blank picture.
    """
    inputs = to_device(forward.inputs, device)
    if "mm_encoder_outputs" not in inputs and "pixel_values" not in inputs:
        return
    model.eval()
    seen = model(**inputs, use_cache=False).logits
    blank = model(**blanked(inputs), use_cache=False).logits
    if torch.equal(seen, blank):
        raise TrainingError(
            "The model's answer does not change when its pictures are blanked, so they do not reach it. Check that "
            "config.json's image_token_id is the id of the tokenizer's image token."
        )


def adapter_record(
    base_model: BaseModel,
    data: TrainingData,
    encoded: EncodedData,
    settings: Parameters,
    parent: ParentAdapter | None,
) -> Record:
    """The adapter's record: its inputs, its settings and the prompt that it was trained with."""
    return {
        "base_model": {
            "name": base_model.name,
            "revision": base_model.revision,
            "fingerprint": base_model.fingerprint,
            "files": base_model.files,
        },
        "prompt": encoded.prompt.to_record(),
        **settings.recorded,
        "parent": parent.describe() if parent else None,
        "data": {
            "train_conversations": {"sha256": encoded.train.sha256, "samples": len(data.train)},
            "validation_conversations": {"sha256": encoded.validation.sha256, "samples": len(data.validation)},
        },
    }


def stage_adapter(model: Any, directory: Path, record: Record, weights: dict[str, torch.Tensor] | None) -> Path:
    """Write the PEFT directory with its record; `weights` in place of the model's own, of which it may hold parts."""
    shutil.rmtree(directory, ignore_errors=True)
    # LoRA on an embedding would bring the base's whole embedding into the adapter.
    model.save_pretrained(directory, state_dict=weights, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (directory / "adapter_record.json").write_text(text, encoding="utf-8")
    return directory


def thin_curve(log: Sequence[Record]) -> list[Record]:
    """Step and losses of at most about MAX_POINTS rows of each loss, for a drawing of the curves: the last are kept."""
    curve: list[Record] = []
    for name in ("loss", "validation_loss"):
        rows = [{"step": row["step"], name: row[name]} for row in log if row.get(name) is not None]
        every = -(-len(rows) // MAX_POINTS) or 1
        curve += rows[::-1][::every][::-1]
    return curve


def _summary(state: TrainingState, log: list[Record], train: Sequence[EncodedConversation]) -> Record:
    losses = [row["loss"] for row in log if "loss" in row]
    validated = [row["validation_loss"] for row in log if "validation_loss" in row]
    return {
        "steps": state.step,
        "epochs": state.epoch,
        "samples": len(train),
        "seconds": round(state.seconds, 3),
        "samples_per_second": round(round(len(train) * state.epoch) / state.seconds, 3),
        "peak_memory_mb": round(state.peak_bytes / 2**20, 1),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_step": state.best_step or state.step,
        "best_validation_loss": state.best_loss,
        "validation_loss": (validated or [None])[-1] if state.best_loss is None else state.best_loss,
    }


def preview_batch(forward: ForwardPass, processor: Any) -> Record:
    """The first training batch as the model sees it: tokens, what is scored, image tokens per picture."""
    tokenizer = processor.tokenizer
    ids = forward.inputs["input_ids"]
    image_token = tokenizer.convert_tokens_to_ids(processor.image_token)
    scored_in_row = [forward.labels[forward.source[0] == row] for row in range(len(ids))]
    rows = []
    for row, scored in zip(ids, scored_in_row, strict=True):
        kept = row[row != tokenizer.pad_token_id] if (row == tokenizer.pad_token_id).any() else row
        rows.append(
            {
                "text": _shorten(tokenizer.decode(kept), processor.image_token),
                "scored": tokenizer.decode(scored),
                "tokens": len(kept),
                "scored_tokens": len(scored),
                "image_tokens": int((kept == image_token).sum()),
            }
        )
    return {"sample_ids": forward.sample_ids, "padded_length": ids.shape[1], "rows": rows}


def _shorten(text: str, image_token: str) -> str:
    """One image token with its count in place of the whole run."""
    import re

    runs = re.compile(f"(?:{re.escape(image_token)})+")
    return runs.sub(lambda run: f"{image_token}×{len(run[0]) // len(image_token)}", text)
