"""Training from conversations to a staged adapter directory."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

from qwen_vl_lora.exceptions import DeviceError, TrainingError
from qwen_vl_lora.features.inputs import choose_pictures
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.modeling.devices import choose_device, usable_precision
from qwen_vl_lora.modeling.lora import add_adapter, check_vision_is_untouched, trainable_parameters
from qwen_vl_lora.modeling.parent import ParentAdapter, find_parent
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import LauncherParameters
from qwen_vl_lora.ranks import here
from qwen_vl_lora.ranks.launching import count_ranks, threads_of_a_rank
from qwen_vl_lora.samples.records import Rejection
from qwen_vl_lora.tuning.batch_size import choose_batch_size
from qwen_vl_lora.tuning.checkpoints import TrainingJob, find_checkpoint
from qwen_vl_lora.tuning.collator import ForwardPass, RowCollator, to_device
from qwen_vl_lora.tuning.data import TrainingData, check_there_is_something, encode_split, reject_too_long
from qwen_vl_lora.tuning.interruption import train_on
from qwen_vl_lora.tuning.provenance import adapter_record, job_inputs
from qwen_vl_lora.tuning.rows import Row, StepSampler, plan_passes, share_groups
from qwen_vl_lora.tuning.settings import TrainingSettings
from qwen_vl_lora.tuning.sharding import check_sharding, sharding_arguments, whole_adapter
from qwen_vl_lora.tuning.shortage import answered_shortage
from qwen_vl_lora.tuning.trainer import LOG_COLUMNS, CaptionTrainer, read_log, tell_rows

logger = logging.getLogger(__name__)

Record = dict[str, Any]
OnLog = Callable[[Record], None]
"""Told each row of `training_log` as it is made: a step may come in two parts, its loss and its validation loss."""


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


def fit_adapter(
    base_model: BaseModel,
    data: TrainingData,
    settings: TrainingSettings,
    workspace: Path,
    on_log: OnLog | None = None,
    launcher: LauncherParameters | None = None,
) -> FittedAdapter:
    """Train a LoRA adapter, or go on with an unfinished training of the very same one.

    Args:
        base_model: what is adapted.
        data: what it is trained on.
        settings: how.
        workspace: folder of the recipe's unfinished work.
        on_log: told every row of `training_log`, those that a resumed training took over first.
        launcher: how many processes share it; None trains in this one.

    Raises:
        DataFormatError: if there is nothing to train on, or too much of it is too long.
        TrainingError: if the result would be wrong: a trainable tower, pictures that do not reach the model, a NaN.
        DeviceError: if the device is not there, or weights cannot be sharded on it.
    """
    from qwen_vl_lora.tuning.launcher import train_on_ranks

    device = choose_device(settings.device)
    settings = replace(settings, training_args=usable_precision(settings.training_args, device))
    if settings.training_args.fp16 and settings.lora.bias != "none":
        raise DeviceError(
            f"lora.bias is `{settings.lora.bias}`, but this GPU has no bfloat16, and biases cannot be trained in "
            "float16. Set lora.bias: none, or training_args.bf16: false to train in float32."
        )
    parent = find_parent(settings.init_adapter, workspace)
    if parent is not None:
        parent.check_continues(base_model, settings.lora, settings.vision)
    ranks = 1 if launcher is None else count_ranks(launcher, device)
    check_sharding(settings.training_args, device, ranks)
    threads = torch.get_num_threads() if launcher is None else threads_of_a_rank(launcher, device)
    inputs = job_inputs(base_model, data, settings, parent, ranks, threads)
    job = TrainingJob(inputs, workspace / "training", parent.place if parent else None)
    job.open()
    checkpoint = find_checkpoint(job, settings.resume)
    if launcher is None or ranks == 1:
        fitted = train(base_model, data, settings, parent, job.folder, checkpoint, on_log)
    else:
        work = (base_model, data, settings, parent, job.folder, checkpoint, on_log)
        fitted = train_on_ranks(*work, launcher, workspace)
    job.close()
    _give_memory_back()
    return fitted


def _give_memory_back() -> None:
    """Trainer and its callbacks refer to each other, and would hold the model while the next one loads."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(
    base_model: BaseModel,
    data: TrainingData,
    settings: TrainingSettings,
    parent: ParentAdapter | None,
    job_folder: Path,
    checkpoint: Path | None,
    on_log: OnLog | None,
) -> FittedAdapter:
    """This process's part of a training; of several ranks, the first writes and its result counts."""
    device = choose_device(settings.device)
    here.note("reading conversations")
    processor = base_model.load_processor()
    sizer = PictureSizer.for_processor(processor, settings.image)
    train, long_train = encode_split(data.train, "training", processor, sizer, data.images, settings)
    validation, long_validation = encode_split(data.validation, "validation", processor, sizer, data.images, settings)
    check_there_is_something(train, validation, settings)

    dtype = settings.training_args.dtype
    pictures = choose_pictures(settings.vision, base_model, data.store, data.images, dtype, processor, sizer)
    here.note("loading the base model")
    model = _load_trainable(base_model, parent, settings, device)
    collator = RowCollator(pictures, processor.tokenizer.pad_token_id, sizer.merge_size)
    size = _batch_size(model, train, collator, settings, job_folder)
    trainer = build_trainer(model, train, validation, collator, settings, size, job_folder)
    first = collator(first_pass(train, settings, size))
    if on_log is not None:
        tell_rows(trainer, checkpoint, on_log)
    with answered_shortage(base_model, train, settings, size):
        check_pictures_reach_the_model(model, first, device)
        train_on(trainer, checkpoint)
    check_vision_is_untouched(model, settings.vision)

    log = read_log(trainer.state.log_history)
    summary = {
        **_summary(trainer, log, train),
        "trainable_parameters": trainable_parameters(model),
        "device": str(device),
        "dtype": dtype,
        "ranks": here.world_size(),
        "resumed_from": checkpoint.name if checkpoint else None,
        "left_out_too_long": len(data.train) - len(train),
    }
    record = {**adapter_record(base_model, data, settings, parent), "training": summary}
    directory = job_folder / "adapter"
    weights = whole_adapter(model)
    if here.is_first():
        stage_adapter(model, directory, record, weights)
    left_out = reject_too_long([*long_train, *long_validation], settings.max_length, data.images)
    return FittedAdapter(directory, log, summary, preview_batch(first, processor), left_out)


def _load_trainable(
    base_model: BaseModel, parent: ParentAdapter | None, settings: TrainingSettings, device: torch.device
) -> Any:
    """The base with a fresh adapter around it, or with the weights of the one to go on from."""
    model = base_model.load_model(
        settings.training_args.dtype, device, quantization=settings.quantization, attention=settings.attention
    )
    model = add_adapter(model, settings.lora, settings.vision, settings.training_args.seed)
    if settings.vision == "frozen":
        model.get_base_model().model.visual = None  # pictures come as stored features: it would only take memory
    if parent is not None:
        parent.load_into(model)
    if settings.training_args.gradient_checkpointing:
        checkpoint_activations(model, settings.vision)
    return model


def checkpoint_activations(model: Any, vision: str) -> None:
    """Recompute the language model's layers in the backward pass, but never a frozen tower's.

    The last layer keeps its activations: its backward comes first, when the memory is there anyway.
    """
    inner = model.get_base_model().model
    _enable_checkpointing(inner.language_model)
    inner.language_model.layers[-1].gradient_checkpointing = False
    if vision == "adapted":
        _enable_checkpointing(inner.visual)


def _enable_checkpointing(model: Any) -> None:
    # transformers 5.2x renames it and warns for the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def captions_per_device(settings: TrainingSettings) -> int:
    """Captions of one optimizer step on one device."""
    return settings.training_args.captions_per_step


def _batch_size(
    model: Any,
    train: Sequence[EncodedConversation],
    collator: RowCollator,
    settings: TrainingSettings,
    job_folder: Path,
) -> int:
    """Captions of one forward pass."""
    size = settings.training_args.per_device_train_batch_size
    if size != "auto":
        return size
    return choose_batch_size(model, train, collator, settings.rows, captions_per_device(settings), job_folder)


def first_pass(train: Sequence[EncodedConversation], settings: TrainingSettings, size: int) -> list[Row]:
    """The rows of this process's first forward pass; where its share is empty, those of one caption."""
    step = [train[index] for index in next(iter(_sampler(train, settings)))] or list(train[:1])
    return plan_passes(step, settings.rows, size)[0]


def _sampler(train: Sequence[EncodedConversation], settings: TrainingSettings) -> StepSampler:
    step_size = captions_per_device(settings) * here.world_size()
    seed = settings.training_args.seed
    return StepSampler(share_groups(train, settings.rows), step_size, seed, here.rank(), here.world_size())


def build_trainer(
    model: Any,
    train: Sequence[EncodedConversation],
    validation: Sequence[EncodedConversation],
    collator: RowCollator,
    settings: TrainingSettings,
    size: int,
    output_dir: Path,
) -> CaptionTrainer:
    """A trainer whose loader gives one optimizer step at a time."""
    arguments = TrainingArguments(
        **{
            # A text alone leaves an adapted tower without gradients; a frozen one has none to wait for.
            "ddp_find_unused_parameters": settings.vision == "adapted",
            "ddp_broadcast_buffers": False,  # they never change
            **settings.training_args.to_training_arguments(),
            **sharding_arguments(model, settings.training_args),
            # One item of the loader is one optimizer step; forward passes are cut inside it.
            "per_device_train_batch_size": captions_per_device(settings),
            "gradient_accumulation_steps": 1,
            "dataloader_pin_memory": False,
            "logging_nan_inf_filter": False,
            "remove_unused_columns": False,
            "label_names": [],
            "report_to": [],
            "disable_tqdm": not sys.stderr.isatty(),
            "output_dir": str(output_dir),
            "use_cpu": choose_device(settings.device).type == "cpu",
            "save_on_each_node": False,  # all machines share the workspace
        }
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # transformers would spread a single process over all GPUs it sees
    patience = settings.training_args.early_stopping_patience
    return CaptionTrainer(
        model,
        arguments,
        train=train,
        validation=validation,
        plan=partial(plan_passes, rows=settings.rows, batch_size=size),
        collator=collator,
        sampler=_sampler(train, settings),
        callbacks=[EarlyStoppingCallback(patience)] if patience is not None else [],
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
    blank = model(**{**inputs, **_blanked(inputs)}, use_cache=False).logits
    if torch.equal(seen, blank):
        raise TrainingError(
            "The model's answer does not change when its pictures are blanked, so they do not reach it. Check that "
            "config.json's image_token_id is the id of the tokenizer's image token."
        )


def _blanked(inputs: Record) -> Record:
    if "pixel_values" in inputs:
        return {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    output = inputs["mm_encoder_outputs"]["image"]
    blank = type(output)(pooler_output=tuple(torch.zeros_like(part) for part in output.pooler_output))
    return {"mm_encoder_outputs": {"image": blank}}


def stage_adapter(model: Any, directory: Path, record: Record, weights: dict[str, torch.Tensor] | None) -> Path:
    """Write the PEFT directory with its record; `weights` in place of the model's own, of which it may hold parts."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, state_dict=weights)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the record says more
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (directory / "adapter_record.json").write_text(text, encoding="utf-8")
    return directory


def _summary(trainer: CaptionTrainer, log: list[Record], train: Sequence[EncodedConversation]) -> Record:
    losses = [row["loss"] for row in log if "loss" in row]
    captions = round(len(train) * (trainer.state.epoch or 0))
    seconds, steps = trainer.progress.seconds, trainer.state.global_step
    return {
        "steps": steps,
        "epochs": trainer.state.epoch,
        "samples": len(train),
        "seconds": round(seconds, 3),
        "samples_per_second": round(captions / seconds, 3),
        "peak_memory_mb": round(trainer.progress.peak_bytes / 2**20, 1),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_step": trainer.state.best_global_step or steps,
        "best_validation_loss": trainer.state.best_metric,
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
