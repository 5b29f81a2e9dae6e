"""Optimizer and schedule of `training_args`, by the factories of transformers and torch.

They are built for the training, and also before a run's first node, so that a wrong value is refused early.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.parameters import Parameters

_OURS = {"early_stopping_patience", "per_device_train_batch_size", "gradient_checkpointing", "fsdp"}
"""Names that the project implements itself."""

_SET_HERE = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps", "num_stable_steps", "mode", "_"}
"""Arguments of the schedules that the training sets itself; `mode` is: the best validation loss is the smallest."""

_PLATEAU = "reduce_lr_on_plateau"

_MANY_STEPS = 10_000
"""Length in steps of the schedule that is tried while the training's length is unknown."""


_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights without weight decay, as in transformers' Trainer."""


def training_arguments(settings: Parameters) -> TrainingArguments:
    """transformers' own arguments, for its factories and its check of values. The loop reads `settings`."""
    return TrainingArguments(
        **settings.training_args.model_dump(exclude=_OURS),
        output_dir="unused",
        report_to=[],
        use_cpu=choose_device(settings.device).type == "cpu",
    )


def make_optimizer(model: Any, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that transformers' Trainer would make, over the trainable weights."""
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NO_DECAY))
    trainable = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in trainable if name in decayed], "weight_decay": arguments.weight_decay},
        {"params": [weight for name, weight in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def make_schedule(optimizer: Any, arguments: TrainingArguments, steps: int) -> Any:
    """transformers' learning rate schedule over `steps` optimizer steps."""
    kind, options = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {}
    return get_scheduler(kind, optimizer, arguments.get_warmup_steps(steps), steps, options)


def check_arguments(settings: Parameters) -> None:
    """Build the optimizer and schedule of a training. Writes nothing.

    Raises:
        ParameterError: if transformers or torch refuses one of them.
    """
    if settings.training_args.fp16 and choose_device(settings.device).type == "cpu":
        raise ParameterError(
            "training_args.fp16 is true, but this run is on a CPU: float16 is for GPUs. Set bf16: true, or fp16: false "
            "to train in float32."
        )
    try:
        arguments = training_arguments(settings)
        make_optimizer(torch.nn.Linear(1, 1), arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ParameterError(f"training_args: transformers refuses these values: {error}") from error
    check_schedule(arguments)


def check_schedule(arguments: TrainingArguments, steps: int | None = None) -> None:
    """Compute the learning rates of a training at many of its steps.

    Args:
        steps: optimizer steps of the training; None while its data are unknown.

    Raises:
        ParameterError: if the schedule refuses `lr_scheduler_kwargs`, or gives a rate that is negative or not finite.
    """
    kind, settings = str(arguments.lr_scheduler_type.value), arguments.lr_scheduler_kwargs or {}
    where = f"training_args.lr_scheduler_kwargs, for lr_scheduler_type `{kind}`"
    known = _settings_of(kind)
    for name in settings:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "none"
            raise ParameterError(f"{where}: unknown name {name!r}{nearest(name, known)}. Allowed: {allowed}.")
    if steps is None:
        steps = arguments.max_steps if arguments.max_steps > 0 else _MANY_STEPS
    warmup = arguments.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        schedule = make_schedule(optimizer, arguments, steps)
        rates = _rates_on_a_plateau(schedule) if kind == _PLATEAU else _rates(schedule, steps, warmup)
        wrong = [rate for rate in rates if not 0 <= rate < math.inf]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ParameterError(
            f"{where}: {settings} cannot be used in {steps} steps, {warmup} of them warm-up: {error}."
        ) from error
    if wrong:
        raise ParameterError(
            f"{where}: {settings} gives a learning rate of {wrong[0]:g}; expected finite rates of 0 or more."
        )


def _settings_of(kind: str) -> set[str]:
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau if kind == _PLATEAU else TYPE_TO_SCHEDULER_FUNCTION[kind]
    return set(inspect.signature(schedule).parameters) - _SET_HERE


def _rates(schedule: Any, steps: int, warmup: int) -> list[float]:
    """Rates of the first and last steps, of those around the end of the warm-up, and of some between."""
    ends = (*range(min(steps, 100)), *range(max(0, steps - 100), steps + 1), min(steps, warmup), min(steps, warmup + 1))
    tried = sorted({*ends, *range(0, steps, max(1, steps // 100))})
    return [schedule.base_lrs[0] * schedule.lr_lambdas[0](step) for step in tried]


def _rates_on_a_plateau(schedule: Any) -> list[float]:
    """Rates for a validation loss that does not fall; this schedule computes them only from losses."""
    rates = []
    for patience in (schedule.patience, schedule.patience, 0, 0, 0):
        schedule.patience = patience
        schedule.step(1.0)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    return rates
