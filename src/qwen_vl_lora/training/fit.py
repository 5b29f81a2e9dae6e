"""A training job: found again by its inputs, trained in this process or by several, left when it is done."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
from typing import Any

import torch

from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.devices import choose_device, usable_dtype
from qwen_vl_lora.model.parent import ParentAdapter, find_parent
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.runs.surroundings import ARITHMETIC
from qwen_vl_lora.samples.workspace import Workspace
from qwen_vl_lora.training.checkpoints import TrainingJob, find_checkpoint
from qwen_vl_lora.training.data import EncodedData, TrainingData, encode_data
from qwen_vl_lora.training.loop import OnRow
from qwen_vl_lora.training.tokenised import FOLDER
from qwen_vl_lora.training.train import FittedAdapter, train


def fit_adapter(
    base_model: BaseModel,
    data: TrainingData,
    settings: Parameters,
    workspace: Workspace,
    on_row: OnRow | None = None,
) -> FittedAdapter:
    """Train a LoRA adapter, or resume an unfinished training with the same inputs.

    Args:
        base_model: what is adapted.
        data: what it is trained on.
        settings: how.
        workspace: of the recipe's unfinished work, and where `init_adapter` is looked for.
        on_row: given every row of `training_log`, those that a resumed training took over first.

    Raises:
        DataFormatError: if there is nothing to train on, or too much of it is too long.
        TrainingError: if the result would be wrong: a trainable tower, pictures that do not reach the model, a NaN.
        DeviceError: if the device is not available, or cannot shard weights.
    """
    device = choose_device(settings.device)
    processes = Processes(settings.cluster, device)
    settings = usable_settings(settings, device, processes.count)
    parent = find_parent(settings.init_adapter, workspace)
    if parent is not None:
        parent.check_continues(base_model, settings.recorded)
    encoded = encode_data(data, base_model, settings, workspace.path / FOLDER)
    inputs = job_inputs(base_model, encoded, settings, parent, processes.count, processes.threads)
    job = TrainingJob(inputs, workspace.path / "training", parent.place if parent else None)
    job.open()
    checkpoint = find_checkpoint(job, settings.resume)
    work = (base_model, data, encoded, settings, parent, job.folder, checkpoint)
    fitted, *_ = processes.on_ranks(train, *work, on_row=on_row)
    job.close()
    _give_memory_back()
    return fitted


def usable_settings(settings: Parameters, device: torch.device, processes: int) -> Parameters:
    """The settings as the device can train with them: float16 in place of bfloat16 on a GPU without it.

    Raises:
        DeviceError: if float16 cannot train these biases, or FSDP would have no effect or was never tested.
    """
    arguments = settings.training_args
    if usable_dtype(arguments.dtype, device) != arguments.dtype:
        arguments = arguments.model_copy(update={"bf16": False, "fp16": True})
    if arguments.fp16 and settings.lora.bias != "none":
        raise DeviceError(
            f"lora.bias is `{settings.lora.bias}`, but this GPU has no bfloat16, and biases cannot be trained in "
            "float16. Set lora.bias: none, or training_args.bf16: false to train in float32."
        )
    if arguments.is_sharded:
        _check_sharding(device, processes, is_float16=arguments.fp16)
    return settings.model_copy(update={"training_args": arguments})


def _check_sharding(device: torch.device, processes: int, *, is_float16: bool) -> None:
    remedy = "Set training_args.fsdp: false"
    if device.type == "cpu":
        raise DeviceError(f"training_args.fsdp shards weights among GPUs, but this run is on a CPU. {remedy}.")
    if processes == 1:
        raise DeviceError(
            f"training_args.fsdp shards weights among processes, but there is only one. {remedy}, or raise "
            "cluster.processes."
        )
    if is_float16:
        raise DeviceError(
            "training_args.fsdp was never tested in float16, whose loss scaler would have to agree over all shards. "
            f"{remedy}, or train in bf16 on a GPU that has it."
        )


def job_inputs(
    base_model: BaseModel,
    data: EncodedData,
    settings: Parameters,
    parent: ParentAdapter | None,
    ranks: int,
    threads: int,
) -> dict[str, Any]:
    """All inputs that determine the adapter's bits. An unfinished run resumes only if all of them are equal."""
    return {
        "arithmetic": ARITHMETIC,
        "base_model": base_model.fingerprint,
        "train_conversations": data.train.sha256,
        "validation_conversations": data.validation.sha256,
        **{name: value for name, value in settings.recorded.items() if name != "generation"},
        "image": settings.image.size,
        "device": choose_device(settings.device).type,
        "image_features": _feature_key(base_model, settings),
        "init_adapter": parent.sha256 if parent else None,
        "ranks": ranks,
        "threads": threads,
        "packages": _packages(settings),
    }


def _feature_key(base_model: BaseModel, settings: Parameters) -> str | None:
    """Key of the stored features, which includes the libraries that compute them; None with `vision: adapted`."""
    if settings.vision == "adapted":
        return None
    return FeatureKey.of(base_model, settings.image.size, settings.training_args.dtype).digest


def _packages(settings: Parameters) -> dict[str, str]:
    quantizing = ("bitsandbytes",) if settings.is_quantized else ()
    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", *quantizing):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # loading the base gives the better error
            found[name] = importlib.metadata.version(name)
    return found


def _give_memory_back() -> None:
    """Free the model before the next one loads: the loop has reference cycles that keep it alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
