"""The blocks `lora` and `training_args`: PEFT's and transformers' own names.

Those that matter most are typed here; the rest are checked against the sources of the installed libraries,
which are read and not imported: torch would come with them.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameter_groups import ParameterGroup, nearest


def _wrong_name(name: str, fault: str) -> PydanticCustomError:
    return PydanticCustomError("library_name", "{name}: {fault}", {"name": name, "fault": fault})


class LibraryGroup(ParameterGroup):
    """A block whose names belong to an installed library: typed fields here, the rest by its own names."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    source: ClassVar[tuple[str, str, str]]
    """(package, file in it, class) whose annotated fields are the allowed names."""
    owned: ClassVar[dict[str, str]]
    """Names that the project sets itself, and where to say it instead."""

    @model_validator(mode="after")
    def _names_belong_to_the_library(self) -> Self:
        extra = self.model_extra or {}
        for name in extra:
            if name in self.owned:
                raise _wrong_name(name, f"set by the project: {self.owned[name]}")
            known = library_names(*self.source) - set(self.owned)
            if name not in known:
                near = nearest(name, known | set(type(self).model_fields))
                raise _wrong_name(name, f"no name of {self.source[2]}{near}")
        return self


class LoraParameters(LibraryGroup):
    """PEFT's LoraConfig, by its own names."""

    source = ("peft", "tuners/lora/config.py", "LoraConfig")
    owned: ClassVar[dict[str, str]] = {
        "exclude_modules": "`vision` says whether the vision tower is adapted",
        "layer_replication": "it changes the base model's depth, which no stored adapter record could describe",
    }

    r: PositiveInt = Field(description="rank")
    lora_alpha: PositiveInt = Field(description="scale; the update is multiplied by lora_alpha / r")
    lora_dropout: float = Field(ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"]
    target_modules: list[str] | str = Field(description="names of linear layers; a list matches by suffix")
    use_rslora: bool = Field(description="scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = Field(description="weight-decomposed LoRA: a little better at low rank, slower")


class TrainingParameters(LibraryGroup):
    """transformers' TrainingArguments, by its own names. Batch sizes count captions."""

    source = ("transformers", "training_args.py", "TrainingArguments")
    owned: ClassVar[dict[str, str]] = {
        "output_dir": "checkpoints lie in the recipe's workspace",
        "report_to": "use the `swanlab` block",
        "run_name": "use the `swanlab` block",
        "project": "use the `swanlab` block",
        "use_cpu": "use `device`",
        "resume_from_checkpoint": "use `resume`",
        "auto_find_batch_size": "use per_device_train_batch_size: auto",
        "remove_unused_columns": "batches are built by the project's own collator",
        "label_names": "batches are built by the project's own collator",
        "prediction_loss_only": "validation measures the loss alone",
        "dataloader_drop_last": "the last, smaller step of an epoch is trained",
        "train_sampling_strategy": "rows of one step are sorted by length without changing the step",
        "ignore_data_skip": "a resumed run continues at its exact sample",
        "label_smoothing_factor": "the loss is the plain mean over answer tokens",
        **dict.fromkeys(
            (
                "push_to_hub",
                "hub_token",
                "hub_model_id",
                "hub_strategy",
                "hub_private_repo",
                "hub_always_push",
                "hub_revision",
            ),
            "the adapter stays in the catalog; upload the directory yourself",
        ),
        "do_train": "run the training pipeline",
        "do_eval": "use eval_strategy",
        "do_predict": "run the evaluation pipeline",
        "local_rank": "use `launcher`",
        "ddp_timeout": "use launcher.timeout",
        "ddp_backend": "NCCL on GPUs, gloo on CPUs",
        "data_seed": "use seed",
        "dataloader_num_workers": "stored features are read faster than a worker could hand them over",
        "gradient_checkpointing_kwargs": "use gradient_checkpointing: true",
        "activation_checkpointing_kwargs": "use gradient_checkpointing: true",
        "torch_empty_cache_steps": "the project's own training step never empties the cache",
        "restore_callback_states_from_checkpoint": "a resumed run takes over its callbacks' counts by itself",
        "save_only_model": "a checkpoint without optimizer state cannot be resumed",
        "neftune_noise_alpha": "noise on embeddings is not part of a reproducible row",
        "deepspeed": "a step is several passes here, and its engine would update the weights after each; use fsdp",
        "fsdp_config": "fsdp: true cuts each layer of the language model; other ways to cut were never tried here",
    }

    per_device_train_batch_size: PositiveInt | Literal["auto"] = Field(
        description="captions of one forward pass; auto takes the largest that fits and keeps the optimizer step"
    )
    gradient_accumulation_steps: PositiveInt = Field(description="forward passes to one optimizer step")
    per_device_eval_batch_size: PositiveInt
    num_train_epochs: PositiveFloat
    max_steps: int = Field(ge=-1, description="-1 trains num_train_epochs; otherwise stops at this optimizer step")
    learning_rate: PositiveFloat
    lr_scheduler_type: str
    warmup_steps: NonNegativeFloat = Field(description="optimizer steps, or below 1 a share of all steps")
    weight_decay: NonNegativeFloat
    max_grad_norm: NonNegativeFloat
    gradient_checkpointing: bool = Field(description="recompute activations: less memory, about a third slower")
    bf16: bool
    fp16: bool
    seed: NonNegativeInt
    logging_steps: PositiveInt
    logging_first_step: bool
    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: PositiveInt | None
    save_strategy: Literal["no", "steps", "epoch", "best"]
    save_steps: PositiveInt
    save_total_limit: PositiveInt | None = Field(description="checkpoints kept")
    save_on_each_node: bool
    load_best_model_at_end: bool = Field(description="publish the step with the best validation loss")
    early_stopping_patience: PositiveInt | None = Field(
        description="EarlyStoppingCallback's own name: validations without improvement before training stops"
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true; set one of them to false")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end needs eval_strategy `steps` or `epoch`, came `no`")
        if self.early_stopping_patience is not None and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("eval_strategy `steps` needs eval_steps")
        return self

    @model_validator(mode="after")
    def _sharding_is_of_a_kind_that_was_tried(self) -> Self:
        fsdp = (self.model_extra or {}).get("fsdp")
        if fsdp not in (None, True, False):
            raise ValueError(f"fsdp is true or false, came {fsdp!r}")
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return bool((self.model_extra or {}).get("fsdp"))

    @property
    def dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """Precision of the frozen weights and of stored image features."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def captions_per_step(self) -> int:
        """Captions of one optimizer step on one device."""
        size = self.per_device_train_batch_size
        return (1 if size == "auto" else size) * self.gradient_accumulation_steps

    def to_training_arguments(self) -> dict[str, Any]:
        """Keyword arguments for TrainingArguments, without those that the project carries out itself."""
        ours = {"early_stopping_patience", "per_device_train_batch_size", "gradient_checkpointing"}
        return self.model_dump(exclude=ours)


@functools.cache
def library_names(package: str, file: str, class_name: str) -> frozenset[str]:
    """Annotated fields of a class, read from its source.

    Importing transformers or peft would bring torch into every `kedro` command.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ParameterError(f"{package} is not installed; install the project's requirements.")
    source = Path(spec.submodule_search_locations[0]) / file
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            targets = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
            return frozenset(target.id for target in targets if isinstance(target, ast.Name))
    raise ParameterError(f"{class_name} is not in {source}; this version of {package} is not supported.")
