"""Every setting of the project, typed: what parameters.yml and --params may say.

The values live in `conf/`; this module holds the names, types and ranges, so there is no default
here that a recipe could forget. `lora` and `training_args` stand in `library_parameters`.
Imports pydantic only: Kedro reads it at every start.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.library_parameters import LoraParameters as LoraParameters
from qwen_vl_lora.library_parameters import TrainingParameters as TrainingParameters
from qwen_vl_lora.parameter_groups import ParameterGroup, nearest


class CaptionsParameters(ParameterGroup):
    """Which rows of the source are taken, and how their text is cleaned."""

    num_rows: PositiveInt | None = Field(description="rows to take; null takes all")
    sampling: Literal["first", "random"] = Field(description="the first rows, or a seeded sample")
    seed: NonNegativeInt = Field(description="seed of the sample; unused with `first`")
    collapse_whitespace: bool = Field(description="edge blanks, runs of blanks and line breaks become one blank")


class PromptParameters(ParameterGroup):
    """What the model is asked. Travels with the adapter."""

    user: str = Field(min_length=1, description="text of the user turn")
    system: str | None = Field(description="system turn; null leaves the chat template's own")
    override: bool = Field(description="replace the samples' own user and system text")


class ImageParameters(ParameterGroup):
    """Size of a picture at the model's door, and which files may be read at all.

    Either `resized_height` and `resized_width` (every picture the same, aspect ratio ignored,
    rounded to multiples of 28) or `min_pixels` and `max_pixels` (aspect ratio kept).
    """

    resized_height: PositiveInt | None = Field(description="px")
    resized_width: PositiveInt | None = Field(description="px")
    min_pixels: PositiveInt | None = Field(description="px; smallest area after resizing")
    max_pixels: PositiveInt | None = Field(description="px; largest area after resizing")
    max_source_pixels: PositiveInt = Field(description="px; a larger original is rejected before it is decoded")
    max_aspect_ratio: float = Field(ge=1, le=200, description="a longer and thinner picture is rejected")
    allowed_roots: list[str] = Field(description="folders outside the project that image paths may lie in")
    allow_urls: bool = Field(description="fetch pictures that a source names by https address")
    url_hosts: list[str] = Field(description="hosts that pictures may be fetched from, redirects included")
    url_timeout: PositiveFloat = Field(description="seconds for one picture")
    url_max_bytes: PositiveInt = Field(description="a larger answer is rejected")

    @model_validator(mode="after")
    def _sizes_are_given_in_one_way(self) -> Self:
        fixed = (self.resized_height, self.resized_width)
        limits = (self.min_pixels, self.max_pixels)
        if all(fixed) and not any(limits):
            return self
        if all(limits) and not any(fixed):
            if (self.min_pixels or 0) > (self.max_pixels or 0):
                raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
            return self
        raise ValueError(
            "give resized_height and resized_width, or min_pixels and max_pixels, and set the other two to null; "
            f"came {self.resized_height=}, {self.resized_width=}, {self.min_pixels=}, {self.max_pixels=}".replace(
                "self.", ""
            )
        )


class QuarantineParameters(ParameterGroup):
    """How much bad data a run accepts."""

    max_share: float = Field(ge=0, le=1, description="share of rejected rows above which the run stops")


class SplitParameters(ParameterGroup):
    """How many images are held out. Counted in images, so captions of one image stay together."""

    test_images: PositiveInt
    validation_images: NonNegativeInt
    seed: NonNegativeInt


def check_endpoint(text: str) -> str:
    """`HOST:PORT` as torch's launcher takes it.

    Raises:
        ValueError: if it is not.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"required is HOST:PORT, such as 10.0.0.1:29400; came {text!r}")
    return text


class LauncherParameters(ParameterGroup):
    """How many processes share the work, by torchrun's own names."""

    nproc_per_node: PositiveInt | Literal["auto"] = Field(
        description="processes on each machine; auto is one for each GPU, or 1"
    )
    nnodes: PositiveInt = Field(description="machines")
    rdzv_endpoint: str | None = Field(description="HOST:PORT of this machine, where the others find it")
    rdzv_timeout: PositiveInt = Field(description="seconds to wait for the others")
    timeout: PositiveInt = Field(description="seconds without progress after which a process counts as hanging")

    @model_validator(mode="after")
    def _machines_have_a_meeting_point(self) -> Self:
        if self.rdzv_endpoint is not None:
            check_endpoint(self.rdzv_endpoint)
        elif self.nnodes > 1:
            raise ValueError(f"nnodes is {self.nnodes}, which needs rdzv_endpoint: HOST:PORT of this machine")
        return self

    @property
    def is_one_process(self) -> bool:
        """Whether everything is done in this very process, whatever the machine."""
        return self.nnodes == 1 and self.nproc_per_node == 1


class GenerationParameters(ParameterGroup):
    """How captions are written. Greedy: the same picture gives the same caption. Travels with the adapter."""

    max_new_tokens: PositiveInt
    repetition_penalty: PositiveFloat = Field(description="1.0 is none; Qwen's own generation config says otherwise")
    batch_size: PositiveInt = Field(description="images captioned at once")


class ScoringParameters(ParameterGroup):
    """How captions are compared with their references."""

    tokenizer: Literal["auto", "ptb", "characters"] = Field(
        description="ptb for English, characters for Chinese; auto looks at the references"
    )
    bootstrap_samples: PositiveInt = Field(description="resamplings behind the confidence intervals")
    seed: NonNegativeInt = Field(description="seed of the resampling")
    settings_from: Literal["parameters", "adapter"] = Field(
        description="parameters refuses an adapter trained with another prompt or picture size; adapter takes its own"
    )


class SwanLabParameters(ParameterGroup):
    """Where a run shows its curves, by swanlab.init's own names. A key is never a parameter: see SWANLAB_API_KEY."""

    mode: Literal["auto", "offline", "local", "online", "disabled"] = Field(
        description="auto is online where SWANLAB_API_KEY is set, offline otherwise"
    )
    project: str = Field(pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$", description="letters, digits and _ - + .")
    experiment_name: str = Field(min_length=1, max_length=512)
    workspace: str | None = Field(pattern=r"^[0-9a-zA-Z_\-]{1,25}$", description="null is the key's own")
    prediction_images: NonNegativeInt = Field(le=50, description="held-out pictures in the chart Prediction")


class InferenceParameters(ParameterGroup):
    """What the inference pipeline captions, and whose prompt and picture size it takes."""

    images: str | None = Field(description="a folder, a picture, or a CSV with image_path; relative to the project")
    recursive: bool = Field(description="look into the folder's folders too")
    settings_from: Literal["parameters", "adapter"] = Field(description="as scoring.settings_from")


class ExportParameters(ParameterGroup):
    """How the merged model is written."""

    dtype: Literal["base", "bfloat16", "float16", "float32"] = Field(description="base keeps the base model's own")
    max_shard_size: str = Field(description="of one safetensors file, in transformers' notation")


_OTHER_ACCELERATORS = {
    "mps": "Apple's GPUs",
    "xpu": "Intel's GPUs",
    "npu": "Ascend's accelerators",
    "hpu": "Gaudi's accelerators",
    "mlu": "Cambricon's accelerators",
    "musa": "Moore Threads' GPUs",
    "tpu": "TPUs",
}


class Parameters(ParameterGroup):
    """The whole tree of parameters.yml."""

    captions: CaptionsParameters
    prompt: PromptParameters
    image: ImageParameters
    max_length: PositiveInt = Field(description="tokens of one training row, image tokens included")
    quarantine: QuarantineParameters
    split: SplitParameters
    lora: LoraParameters
    training_args: TrainingParameters
    vision: Literal["frozen", "adapted"]
    rows: Literal["shared", "separate"]
    resume: str = Field(min_length=1, description="auto, never, or the path of a checkpoint")
    device: Literal["auto", "cpu", "cuda"]
    attention: Literal["sdpa", "flash_attention_2"]
    quantization: Literal["nf4", "int8"] | None = Field(description="bits of the language model's frozen weights")
    init_adapter: str | None = Field(min_length=1, description="path or version of an adapter to go on from")
    launcher: LauncherParameters
    generation: GenerationParameters
    scoring: ScoringParameters
    swanlab: SwanLabParameters
    inference: InferenceParameters
    export: ExportParameters

    recipe: str | None = Field(default=None, description="name of the data folders; from --params only")
    base_model: str | None = Field(default=None, description="path or hub id; from --params only")
    captions_file: str | None = Field(default=None, description="the user's own table or JSON; from --params only")

    @field_validator("device", mode="before")
    @classmethod
    def _other_accelerators_are_refused_by_name(cls, device: Any) -> Any:
        kind, _, number = str(device).partition(":")
        if kind == "cuda" and number.isdigit():
            raise ValueError(f"`{device}` names one GPU; give cuda, and choose it with CUDA_VISIBLE_DEVICES={number}")
        if kind in _OTHER_ACCELERATORS:
            raise ValueError(
                f"`{device}` is not supported: exact resume, stored features and memory figures were never checked on "
                f"{_OTHER_ACCELERATORS[kind]}. Give cuda (NVIDIA, or AMD with a ROCm build of torch) or cpu"
            )
        return device

    @model_validator(mode="after")
    def _attention_can_do_what_is_asked(self) -> Self:
        if self.attention == "sdpa":
            return self
        if self.rows == "shared":
            raise ValueError(
                "attention is `flash_attention_2`, which takes no mask that keeps the answers of a shared row apart; "
                "set rows: separate, or attention: sdpa"
            )
        if self.device == "cpu" or self.training_args.dtype == "float32":
            raise ValueError(
                "attention is `flash_attention_2`, which computes on a GPU in half precision only; set "
                "training_args.bf16: true and device: cuda, or attention: sdpa"
            )
        return self

    @model_validator(mode="after")
    def _biases_can_be_trained(self) -> Self:
        if self.lora.bias == "all" and self.vision == "frozen":
            raise ValueError(
                "lora.bias `all` would train the vision tower's biases too, but vision is `frozen`; "
                "set lora.bias: lora_only, or vision: adapted"
            )
        if self.lora.bias != "none" and self.training_args.dtype == "float16":
            raise ValueError(
                f"lora.bias is `{self.lora.bias}`, but biases cannot be trained in float16, which scales gradients of "
                "float32 weights only; set lora.bias: none, or bf16 in place of fp16"
            )
        return self

    @model_validator(mode="after")
    def _sharding_can_do_what_is_asked(self) -> Self:
        if not self.training_args.is_sharded:
            return self
        if self.vision == "adapted":
            raise ValueError(
                "training_args.fsdp makes all processes gather each layer together, and a pass without pictures would "
                "skip the adapted tower's; set vision: frozen, or training_args.fsdp: false"
            )
        if self.quantization is not None:
            raise ValueError(
                f"quantization is `{self.quantization}`, whose packed weights were never sharded here; set "
                "quantization: null, or training_args.fsdp: false"
            )
        if self.launcher.is_one_process:
            raise ValueError(
                "training_args.fsdp shards weights among processes, and launcher says one; raise "
                "launcher.nproc_per_node or launcher.nnodes, or set training_args.fsdp: false"
            )
        return self

    @model_validator(mode="after")
    def _validation_has_images(self) -> Self:
        if self.training_args.eval_strategy != "no" and self.split.validation_images == 0:
            raise ValueError(
                f"training_args.eval_strategy is `{self.training_args.eval_strategy}` but split.validation_images "
                "is 0; hold out some images or set eval_strategy: 'no'"
            )
        return self


def validate_parameters(tree: dict[str, Any]) -> Parameters:
    """The resolved parameters of a run, typed.

    Raises:
        ParameterError: with one line for every fault: the key, what it allows and what came.
    """
    try:
        return Parameters.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        raise ParameterError(
            f"{error.error_count()} wrong in the parameters (conf/*/parameters.yml and --params); nothing was run:\n"
            f"{faults}\nSee docs/parameters.md for every key."
        ) from error


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("constrained-", "literal[")))
    got = fault["input"]
    if fault["type"] == "extra_forbidden":
        group = _group_at(fault["loc"][:-1])
        known = set(group.model_fields)
        return f"{key}: unknown key{nearest(str(fault['loc'][-1]), known)}. Allowed: {', '.join(sorted(known))}."
    if fault["type"] == "library_name":
        return f"{key}.{fault['ctx']['name']}: {fault['ctx']['fault']}."
    if fault["type"] == "missing":
        return f"{key}: required, but not given."
    if fault["type"] == "value_error":
        return f"{key + ': ' if key else ''}{fault['ctx']['error']}."
    shown = got if not isinstance(got, float) or math.isfinite(got) else str(got)
    return f"{key}: {fault['msg']}; came {shown!r}."


def _group_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    group: type[BaseModel] = Parameters
    for part in location:
        annotation = group.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        group = annotation
    return group
