"""Blocks whose names belong to a library, and `training_args`: transformers' own names.

Every allowed name is a typed field here, and a test shows its effect. Every other name is refused with a replacement.
The names of the installed libraries are parsed from their sources, because importing them would import torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameter_groups import ParameterGroup, nearest
from qwen_vl_lora.training_names import REFUSED_TRAINING_NAMES, REMOVED_TRAINING_NAMES


def wrong_name(name: str, fault: str) -> PydanticCustomError:
    return PydanticCustomError("library_name", "{name}: {fault}", {"name": name, "fault": fault})


class LibraryGroup(ParameterGroup):
    """A block whose names belong to an installed library. Its typed fields are the names that are allowed."""

    source: ClassVar[tuple[str, str, str]]
    """(package, file in it, class) whose annotated fields are the library's names."""
    refused: ClassVar[dict[str, str]]
    """The library's names that are not allowed: why, and what to write instead."""
    removed: ClassVar[dict[str, str]] = {}
    """Names of older versions of the library, and what to write instead."""

    @classmethod
    def why_refused(cls, name: str) -> str:
        """Why a name that is not a field of this block is refused, and what to write instead."""
        if name in cls.refused:
            return cls.refused[name]
        if name in cls.removed:
            return f"not a name of {cls.source[2]} in the installed {cls.source[0]}; {cls.removed[name]}"
        if name in library_names(*cls.source):
            return f"a name of {cls.source[2]} that is not supported here: its effect was never tested; remove it"
        return f"not a name of {cls.source[2]}{nearest(name, set(cls.model_fields))}"


_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_ADAM = ("adafactor", "sgd")
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")


def dtype_of(training_args: Mapping[str, Any]) -> Literal["bfloat16", "float16", "float32"]:
    """Precision of a training. Also reads stored records, whose other names may be refused today."""
    return "bfloat16" if training_args["bf16"] else "float16" if training_args["fp16"] else "float32"


class TrainingParameters(LibraryGroup):
    """transformers' TrainingArguments, by its own names. Batch sizes count captions.

    Fields with a default of None may be left out; transformers' own default then applies, and records omit them.
    """

    source = ("transformers", "training_args.py", "TrainingArguments")
    refused: ClassVar[dict[str, str]] = REFUSED_TRAINING_NAMES
    removed: ClassVar[dict[str, str]] = REMOVED_TRAINING_NAMES

    @model_validator(mode="before")
    @classmethod
    def _stored_runs_may_say_what_is_always_so(cls, given: Any) -> Any:
        """Parameters that were stored with a run once stated `save_on_each_node: false`."""
        if isinstance(given, dict) and given.get("save_on_each_node") is False:
            return {name: value for name, value in given.items() if name != "save_on_each_node"}
        return given

    per_device_train_batch_size: PositiveInt | Literal["auto"] = Field(
        description="captions of one forward pass; auto takes the largest that fits and keeps the optimizer step"
    )
    gradient_accumulation_steps: PositiveInt = Field(description="forward passes to one optimizer step")
    per_device_eval_batch_size: PositiveInt
    num_train_epochs: PositiveFloat
    max_steps: int = Field(description="-1 trains num_train_epochs; otherwise stops at this optimizer step")
    learning_rate: PositiveFloat
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ]
    lr_scheduler_kwargs: dict[str, Any] | None = Field(default=None, description="settings of the schedule")
    warmup_steps: NonNegativeFloat = Field(description="optimizer steps, or below 1 a share of all steps")
    weight_decay: NonNegativeFloat
    optim: Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"] | None = None
    adam_beta1: float | None = Field(default=None, ge=0, lt=1)
    adam_beta2: float | None = Field(default=None, ge=0, lt=1)
    adam_epsilon: float | None = Field(default=None, ge=1e-30, description="float32 rounds smaller ones to 0")
    max_grad_norm: NonNegativeFloat
    gradient_checkpointing: bool = Field(description="recompute activations: less memory, about a third slower")
    bf16: bool
    fp16: bool
    seed: NonNegativeInt = Field(lt=2**32)
    logging_strategy: Literal["steps", "epoch"] | None = None
    logging_steps: PositiveInt
    logging_first_step: bool
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: PositiveInt | None
    save_strategy: Literal["no", "steps", "epoch"]
    save_steps: PositiveInt
    save_total_limit: PositiveInt | None = Field(description="checkpoints kept")
    load_best_model_at_end: bool = Field(description="publish the step with the best validation loss")
    metric_for_best_model: Literal["loss", "eval_loss"] | None = None
    early_stopping_patience: PositiveInt | None = Field(
        description="as in EarlyStoppingCallback: validations without improvement before training stops"
    )
    fsdp: bool | None = Field(default=None, description="shard the weights among the processes")

    @field_validator("eval_strategy", "save_strategy", "logging_strategy", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, strategy: Any) -> Any:
        if strategy is False:
            raise ValueError('YAML reads an unquoted no as false; expected a text, got false: write "no" in quotes')
        return strategy

    @field_validator("logging_strategy", mode="before")
    @classmethod
    def _the_loss_is_logged(cls, strategy: Any) -> Any:
        if strategy in ("no", False):
            raise ValueError("expected `steps` or `epoch`, got `no`: training_log and its curves need the loss")
        return strategy

    @field_validator("save_strategy", mode="before")
    @classmethod
    def _a_checkpoint_can_always_be_resumed(cls, strategy: Any) -> Any:
        if strategy == "best":
            raise ValueError(
                "`best` is not supported: while the loss does not improve there would be no checkpoint to resume from; "
                "expected `no`, `steps` or `epoch`. load_best_model_at_end: true publishes the best step"
            )
        return strategy

    @field_validator("max_steps")
    @classmethod
    def _at_least_one_step(cls, steps: int) -> int:
        if steps < 1 and steps != -1:
            raise ValueError(f"expected -1, which trains num_train_epochs, or at least 1; got {steps}")
        return steps

    @field_validator("warmup_steps")
    @classmethod
    def _whole_steps_or_a_share(cls, steps: float) -> float:
        if steps > 1 and steps != int(steps):
            raise ValueError(f"expected whole optimizer steps, or below 1 a share of all steps; got {steps}")
        return steps

    @field_validator("fsdp", mode="before")
    @classmethod
    def _sharding_is_of_a_kind_that_was_tried(cls, fsdp: Any) -> Any:
        if fsdp not in (None, True, False):
            raise ValueError(f"expected true or false; got {fsdp!r}")
        return fsdp

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        faults = [*self._precision_faults(), *self._best_step_faults(), *self._optimizer_faults()]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _precision_faults(self) -> list[str]:
        return ["bf16 and fp16 are both true; set one of them to false"] if self.bf16 and self.fp16 else []

    def _best_step_faults(self) -> list[str]:
        """Faults of settings for the best step: every validation that may be the best needs a checkpoint."""
        evaluated, saved, faults = self.eval_strategy, self.save_strategy, []
        if evaluated == "steps" and self.eval_steps is None:
            faults.append("eval_strategy `steps` needs eval_steps")
        if evaluated != "steps" and self.eval_steps is not None:
            faults.append(
                f"eval_steps is {self.eval_steps}, but eval_strategy is `{evaluated}`; set eval_strategy: steps, or "
                "eval_steps: null"
            )
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            faults.append(
                "early_stopping_patience needs load_best_model_at_end: true, with save_strategy equal to eval_strategy"
            )
        if self.metric_for_best_model is not None and not self.load_best_model_at_end:
            faults.append("metric_for_best_model needs load_best_model_at_end: true")
        if not self.load_best_model_at_end:
            return faults
        if evaluated == "no":
            faults.append("load_best_model_at_end needs eval_strategy `steps` or `epoch`, got `no`")
        elif saved != evaluated:
            faults.append(
                "load_best_model_at_end needs a checkpoint of every validation: save_strategy must equal "
                f"eval_strategy; got save_strategy `{saved}` and eval_strategy `{evaluated}`. Set save_strategy: "
                f"{evaluated}"
            )
        elif saved == "steps" and self.save_steps != self.eval_steps:
            faults.append(
                "load_best_model_at_end needs a checkpoint of every validation: save_steps must equal eval_steps; got "
                f"save_steps {self.save_steps} and eval_steps {self.eval_steps}"
            )
        return faults

    def _optimizer_faults(self) -> list[str]:
        """Faults of settings that transformers would ignore silently."""
        schedule, faults = self.lr_scheduler_type, []
        if schedule in _WITHOUT_WARMUP and self.warmup_steps:
            other = "constant_with_warmup, or set " if schedule == "constant" else "another lr_scheduler_type, or set "
            faults.append(f"lr_scheduler_type `{schedule}` has no warm-up; use {other}warmup_steps: 0")
        if schedule in _WITHOUT_KWARGS and self.lr_scheduler_kwargs:
            faults.append(f"lr_scheduler_type `{schedule}` takes no lr_scheduler_kwargs; remove them")
        if schedule == "reduce_lr_on_plateau" and self.eval_strategy == "no":
            faults.append(
                "lr_scheduler_type `reduce_lr_on_plateau` needs a validation loss; set eval_strategy: epoch or steps"
            )
        given = [name for name in _ADAM if getattr(self, name) is not None]
        if self.optim in _WITHOUT_ADAM and given:
            faults.append(
                f"optim `{self.optim}` does not use {', '.join(given)}; remove them, or use adamw_torch_fused"
            )
        if self.optim in _WITHOUT_ADAM and self.fsdp:
            faults.append(f"optim `{self.optim}` was never tested with fsdp; use adamw_torch_fused")
        return faults

    @model_serializer(mode="wrap")
    def _without_what_was_not_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {name: value for name, value in dump(self).items() if value is not None or fields[name].is_required()}

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only a part of the weights."""
        return bool(self.fsdp)

    @property
    def dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """Precision of the frozen weights and of stored image features."""
        return dtype_of({"bf16": self.bf16, "fp16": self.fp16})

    @property
    def captions_per_step(self) -> int:
        """Captions of one optimizer step on one device."""
        size = self.per_device_train_batch_size
        return (1 if size == "auto" else size) * self.gradient_accumulation_steps


@functools.cache
def library_names(package: str, file: str, class_name: str) -> frozenset[str]:
    """Annotated fields of a class, read from its source.

    Importing transformers or peft would import torch in every `kedro` command.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ParameterError(f"{package} is not installed; install the project's requirements.")
    source = Path(spec.submodule_search_locations[0]) / file
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            targets = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in targets if isinstance(target, ast.Name))
    raise ParameterError(f"{class_name} not found in {source}; this version of {package} is not supported.")
