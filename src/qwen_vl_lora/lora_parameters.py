"""The block `lora`: the names of PEFT that were tested to train, to load again and to merge in this project."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from qwen_vl_lora.library_parameters import LibraryGroup, wrong_name


class LoraParameters(LibraryGroup):
    """PEFT's LoraConfig, by its own names, limited to those that were tested to train, to load again and to merge.

    A name that parameters.yml does not state has PEFT's default, and records omit it. `model.lora.check_lora`
    checks module names against the base.
    """

    source = ("peft", "tuners/lora/config.py", "LoraConfig")
    refused: ClassVar[dict[str, str]] = {
        "task_type": "remove it; the project always trains with task_type CAUSAL_LM, as the tutorials do",
        "inference_mode": "remove it; the project sets it to false in training and to true where it loads an adapter",
        "peft_type": "remove it; the adapter is always of peft_type LORA",
        "peft_version": "remove it; PEFT writes its own version into adapter_config.json",
        "base_model_name_or_path": "remove it; give the base by base_model",
        "revision": "remove it; give the base and its revision by base_model: owner/name@revision",
        "auto_mapping": "it names code to import when the adapter is loaded, which the project never does",
        "fan_in_fan_out": "it is for GPT-2's transposed layers; the linear layers of Qwen's models are not transposed",
        "layer_replication": "it changes the base model's depth, which no stored adapter record could describe",
        "lora_bias": "PEFT cannot merge such a bias into a layer without one; to train the base's biases set bias",
        "target_parameters": "the base has no stacked expert weights; name layers in target_modules",
        "trainable_token_indices": "new or changed tokens are not supported; to train embeddings use modules_to_save",
        "ensure_weight_tying": "export unties the embeddings of a tied base where LoRA or modules_to_save changes one",
        "alora_invocation_tokens": "aLoRA acts after an invocation text only, and no trained prompt here contains one",
        "loftq_config": "LoftQ is not supported; quantized training is plain QLoRA: use quantization",
        "eva_config": "EVA needs a pass over the data before training, which is not part of this project",
        "corda_config": "CorDA needs a pass over the data before training, which is not part of this project",
        "lora_ga_config": "LoRA-GA needs gradients from before training, which are not part of this project",
        "use_qalora": "QALoRA needs a GPTQ-quantized base, which is not supported; use quantization",
        "qalora_group_size": "QALoRA needs a GPTQ-quantized base, which is not supported; use quantization",
        "velora_config": "VeLoRA was not tested here; to save memory use training_args.gradient_checkpointing",
        "monteclora_config": "MonteCLoRA needs a loss term that the project's training does not add",
        "kasa_config": "KaSA needs a loss term that the project's training does not add",
        "use_bdlora": "block-diagonal LoRA is for sharded serving engines and was not tested here",
        "arrow_config": "Arrow routes between several adapters, and a run trains one",
        "runtime_config": "it moves DoRA's weights between devices at run time, which was not tested here",
        "megatron_config": "Megatron's parallel layers do not occur in these models",
        "megatron_core": "Megatron's parallel layers do not occur in these models",
    }

    r: PositiveInt = Field(description="rank")
    lora_alpha: PositiveInt = Field(description="scale; the update is multiplied by lora_alpha / r")
    lora_dropout: float = Field(ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"]
    target_modules: list[str] | str = Field(
        description="linear layers or embeddings: a list of names, which match by suffix; or one regular expression"
    )
    use_rslora: bool = Field(description="scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = Field(description="weight-decomposed LoRA: a little better at low rank, slower")
    exclude_modules: list[str] | str | None = Field(default=None, description="not adapted; names as target_modules")
    modules_to_save: list[str] | None = Field(default=None, description="modules trained as a whole, without LoRA")
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = Field(
        default=None, description="indices of the layers that are adapted; null adapts all"
    )
    layers_pattern: list[str] | str | None = Field(
        default=None, description="name of the list of layers that layers_to_transform counts, such as layers"
    )
    rank_pattern: dict[str, PositiveInt] | None = Field(default=None, description="ranks other than r, by module name")
    alpha_pattern: dict[str, PositiveInt] | None = Field(default=None, description="the same for lora_alpha")
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] | None = Field(
        default=None, description="initial weights of LoRA; null is PEFT's default, true"
    )

    @field_validator("target_modules", "exclude_modules", mode="before")
    @classmethod
    def _modules_are_names_or_one_pattern(cls, modules: Any) -> Any:
        if isinstance(modules, str):
            check_pattern(modules)
        elif modules is not None:
            check_names(modules)
        return modules

    @field_validator("target_modules", "layers_to_transform", mode="before")
    @classmethod
    def _an_empty_list_is_refused(cls, given: Any) -> Any:
        if given == []:
            raise ValueError("the list is empty; expected at least one entry")
        return given

    @field_validator("modules_to_save", mode="before")
    @classmethod
    def _modules_are_names(cls, modules: Any) -> Any:
        if modules is not None:
            check_names(modules)
        return modules

    @field_validator("layers_pattern", mode="before")
    @classmethod
    def _lists_of_layers_are_names(cls, lists: Any) -> Any:
        if lists is not None:
            check_names([lists] if isinstance(lists, str) else lists)
        return lists

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _layers_are_indices(cls, layers: Any) -> Any:
        for layer in layers if isinstance(layers, list) else [layers]:
            if layers is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
                raise ValueError(f"expected an index of a layer, from 0, or a list of them; got {layer!r}")
        return layers

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _keys_are_patterns(cls, pattern: Any) -> Any:
        for key in pattern if isinstance(pattern, dict) else ():
            check_pattern(key)
        return pattern

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _initial_weights_need_no_preparation(cls, init: Any) -> Any:
        if init is None or isinstance(init, bool) or init in ("gaussian", "pissa", "olora", "orthogonal"):
            return init
        reason = next((text for name, text in _OTHER_STARTS.items() if str(init).lower().startswith(name)), "")
        raise ValueError(f"expected true, false, gaussian, pissa, olora or orthogonal; got {init!r}{reason}")

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise wrong_name(
                "layers_to_transform",
                f"it selects among the names of a list, and target_modules is the text {self.target_modules!r}; give "
                "target_modules as a list, or name the layers in the regular expression",
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise wrong_name("layers_pattern", "it applies to layers_to_transform, which is not given")
        odd = [rank for rank in (self.r, *(self.rank_pattern or {}).values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            raise wrong_name("init_lora_weights", f"`orthogonal` needs even ranks; got {odd[0]} in r or rank_pattern")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Names that were added later must not change the records and fingerprints of runs without them.
        return {name: value for name, value in dump(self).items() if value is not None}


_OTHER_STARTS = {
    "pissa_niter": ". Its randomized SVD cannot be repeated when the adapter is loaded, so the base would differ from "
    "the one in training; use pissa",
    "eva": ". It needs a pass over the data before training",
    "corda": ". It needs a pass over the data before training",
    "lora_ga": ". It needs gradients from before training",
    "loftq": ". LoftQ is not supported; quantized training is plain QLoRA: use quantization",
    "mica": ". It was not tested here",
}
"""Why PEFT's other values of init_lora_weights are refused."""

_MODULE_NAME = re.compile(r"\w+(\.\w+)*")


def check_names(modules: Any) -> None:
    """Check that `modules` is a list of module names or their last parts.

    Raises:
        ValueError: naming the first wrong entry.
    """
    if not isinstance(modules, list):
        raise ValueError(f"expected a list of module names, such as [q_proj, v_proj]; got {modules!r}")
    for name in modules:
        if not isinstance(name, str) or _MODULE_NAME.fullmatch(name) is None:
            raise ValueError(
                f"expected a list of module names or their last parts, such as q_proj or self_attn.q_proj; got {name!r}"
            )


def check_pattern(pattern: Any) -> None:
    """Check that `pattern` is a regular expression.

    Raises:
        ValueError: with Python's error message.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"expected a regular expression that matches names of modules; got {pattern!r}")
    try:
        re.compile(f"(?:{pattern})")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a regular expression; got {pattern!r}: {error}") from error
