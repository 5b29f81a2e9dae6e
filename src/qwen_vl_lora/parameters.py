"""Every setting of the project, typed: the keys and values that parameters.yml and --params may contain.

The values are in `conf/`; this module has the names, types and ranges. Only keys that stored runs lack have a
default here, the value of `conf/`. `lora`, `training_args`, `inference` and `evaluation` are in modules of their own.
Imports pydantic only: Kedro reads it at every start.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal, NamedTuple, Self, get_args

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

from qwen_vl_lora.evaluation_parameters import EvaluationParameters as EvaluationParameters
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.inference_parameters import InferenceParameters as InferenceParameters
from qwen_vl_lora.library_parameters import LibraryGroup
from qwen_vl_lora.library_parameters import TrainingParameters as TrainingParameters
from qwen_vl_lora.lora_parameters import LoraParameters as LoraParameters
from qwen_vl_lora.parameter_groups import ParameterGroup, nearest


class ColumnsParameters(ParameterGroup):
    """Names of the columns or keys in the user's file; null selects the usual names."""

    image: str | None = Field(default=None, min_length=1, description="the picture: its path or address")
    caption: str | list[str] | None = Field(default=None, description="the caption; a list of names for several")
    id: str | None = Field(default=None, min_length=1, description="id of the picture")


class CaptionsParameters(ParameterGroup):
    """Which rows of the source are taken, and how their text is cleaned."""

    num_rows: PositiveInt | None = Field(description="rows to take; null takes all")
    sampling: Literal["first", "random"] = Field(description="the first rows, or a seeded sample")
    seed: NonNegativeInt = Field(description="seed of the sample; unused with `first`")
    collapse_whitespace: bool | Literal["auto"] = Field(
        description="strip blanks and merge runs of blanks and line breaks; auto: in captions, not chat texts"
    )
    # Stored runs older than these keys lack them. With these defaults, those of parameters.yml, they can be replayed.
    nothing_words: Literal["reject", "keep"] = Field(
        default="reject", description="answers such as `None`, `N/A` and `#REF!`"
    )
    columns: ColumnsParameters = Field(
        default_factory=ColumnsParameters, description="names of columns or keys, where they are not the usual ones"
    )
    split_column: str | None = Field(
        default=None, min_length=1, description="holds train, validation or test for each row"
    )
    sidecar_lines: Literal["first", "all"] = Field(
        default="first", description="which lines of a text file beside a picture are captions"
    )
    exclude: str | None = Field(
        default=None, min_length=1, description="list of rows to leave out, as the data page writes it"
    )


class PromptParameters(ParameterGroup):
    """The prompt. It is stored with the adapter."""

    user: str = Field(min_length=1, description="text of the user turn")
    system: str | None = Field(description="system turn; null leaves the chat template's own")
    override: bool = Field(description="replace the samples' own user and system text")


_MAX_RATIO = 200
"""Largest ratio of a picture's sides. qwen-vl-utils and transformers refuse a larger one."""


class ImageParameters(ParameterGroup):
    """Size of a picture as the model gets it, and which files may be read.

    Either `resized_height` and `resized_width` (one size for every picture, aspect ratio ignored,
    rounded to whole image tokens) or `min_pixels` and `max_pixels` (aspect ratio kept).
    """

    resized_height: PositiveInt | None = Field(description="px")
    resized_width: PositiveInt | None = Field(description="px")
    min_pixels: PositiveInt | None = Field(description="px; smallest area after resizing")
    max_pixels: PositiveInt | None = Field(description="px; largest area after resizing")
    max_source_pixels: PositiveInt = Field(description="px; a larger original is rejected before it is decoded")
    max_aspect_ratio: float = Field(ge=1, le=_MAX_RATIO, description="a picture with a larger ratio is rejected")
    storage: Literal["copy", "reference"] = Field(
        default="copy",  # for runs that were stored before the key existed, as above
        description="copy: the bytes are stored once, by content. reference: files stay where they are",
    )
    allowed_roots: list[str] = Field(description="folders outside the project that image paths may be in")
    more_formats: list[Literal["AVIF", "HEIC", "TIFF"]] = Field(
        default=[],  # for runs that were stored before the key existed, as above
        description="decoded beside JPEG, PNG, WebP, GIF and BMP",
    )
    allow_urls: bool = Field(description="download pictures that a source names by https address")
    url_hosts: list[str] = Field(description="hosts that pictures may be downloaded from, redirects included")
    url_timeout: PositiveFloat = Field(description="seconds for one picture")
    url_max_bytes: PositiveInt = Field(description="a larger response is rejected")

    @property
    def size(self) -> dict[str, int | None]:
        """The size of a picture for the model, without the limits on files."""
        return self.model_dump(include={"resized_height", "resized_width", "min_pixels", "max_pixels"})

    @model_validator(mode="after")
    def _sizes_are_given_in_one_way(self) -> Self:
        fixed = (self.resized_height, self.resized_width)
        limits = (self.min_pixels, self.max_pixels)
        if all(fixed) and not any(limits):
            self._check_fixed_size(self.resized_height or 0, self.resized_width or 0)
            return self
        if all(limits) and not any(fixed):
            if (self.min_pixels or 0) > (self.max_pixels or 0):
                raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
            return self
        raise ValueError(
            "give resized_height and resized_width, or min_pixels and max_pixels, and set the other two to null; "
            f"got {self.resized_height=}, {self.resized_width=}, {self.min_pixels=}, {self.max_pixels=}".replace(
                "self.", ""
            )
        )

    @staticmethod
    def _check_fixed_size(height: int, width: int) -> None:
        ratio = max(height, width) / min(height, width)
        if ratio > _MAX_RATIO:
            raise ValueError(
                f"resized_height {height} and resized_width {width} differ by a factor of {ratio:.0f}; expected at "
                f"most {_MAX_RATIO}"
            )


class QuarantineParameters(ParameterGroup):
    """How much bad data a run accepts."""

    max_share: float = Field(ge=0, le=1, description="share of rejected rows above which the run stops")


class HeldOut(NamedTuple):
    """How many images a side of the split takes: a number, or a share of all images with an optional limit."""

    number: int | None
    share: float = 0.0
    limit: int | None = None

    def of(self, num_images: int) -> int:
        """Images out of `num_images`; a share is rounded to at least one image."""
        if self.number is not None:
            return self.number
        count = max(1, round(self.share * num_images))
        return count if self.limit is None else min(count, self.limit)


_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?) ?%(?: up to ([1-9]\d*))?", re.ASCII)


def parse_held_out(value: object) -> HeldOut:
    """`64`, `0.1`, `10%` or `10% up to 64`.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return HeldOut(value)
    if isinstance(value, float) and 0 < value < 1:
        return HeldOut(None, value)
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is not None and float(match[1]) > 0:
        return HeldOut(None, float(match[1]) / 100, int(match[2]) if match[2] else None)
    raise ValueError(
        "expected a number of images (64; 0 holds out none), a share of them (10% or 0.1), or a share with a limit "
        f"(10% up to 64); got {value!r}"
    )


class SplitParameters(ParameterGroup):
    """How many images are held out. The split is by image, so captions of one image stay together."""

    test_images: int | float | str = Field(description="a number, a share (10% or 0.1), or 10% up to 64")
    validation_images: int | float | str = Field(description="as test_images")
    seed: NonNegativeInt

    @field_validator("test_images", "validation_images", mode="before")
    @classmethod
    def _is_a_number_or_a_share(cls, value: Any) -> Any:
        parse_held_out(value)
        return value

    def held_out(self, side: Literal["test", "validation"]) -> HeldOut:
        """The parsed value of a side."""
        return parse_held_out(self.test_images if side == "test" else self.validation_images)


class ClusterParameters(ParameterGroup):
    """How many processes share the work, and where."""

    address: str | None = Field(description="null is this machine; auto or HOST:PORT joins a Ray cluster that runs")
    processes: PositiveInt | Literal["auto"] = Field(
        description="in all; auto is one for each GPU; without GPUs one, or one for each machine of a cluster"
    )
    gpus_per_process: PositiveInt = Field(description="GPUs that a Ray cluster reserves for each process")
    timeout: PositiveInt = Field(description="seconds without progress after which a process counts as hanging")

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        host, _, port = (value or "auto").rpartition(":")
        if value not in (None, "auto") and not (host and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"expected null, auto or HOST:PORT, such as 10.0.0.1:6379; got {value!r}")
        return value

    @model_validator(mode="after")
    def _gpus_are_reserved_in_a_cluster(self) -> Self:
        if self.address is None and self.gpus_per_process != 1:
            raise ValueError("gpus_per_process needs a cluster: on this machine each process has one GPU; set it to 1")
        return self


ONE_PROCESS = ClusterParameters.model_construct(address=None, processes=1, gpus_per_process=1, timeout=1800)


class GenerationParameters(ParameterGroup):
    """How captions are generated: greedily, so a picture always gets the same caption. Stored with the adapter."""

    max_new_tokens: PositiveInt
    repetition_penalty: PositiveFloat = Field(description="1.0 is none; Qwen's own generation config has another value")
    batch_size: PositiveInt = Field(description="images captioned at once")


class ScoringParameters(ParameterGroup):
    """How captions are compared with their references."""

    tokenizer: Literal["auto", "ptb", "characters"] = Field(
        description="ptb for English, characters for Chinese; auto decides by the references"
    )
    bootstrap_samples: PositiveInt = Field(description="resamplings behind the confidence intervals")
    seed: NonNegativeInt = Field(description="seed of the resampling")
    settings_from: Literal["parameters", "adapter"] = Field(
        description="parameters refuses an adapter trained with another prompt or picture size; adapter uses its own"
    )
    by_server: Literal["base", "tuned"] | None = Field(
        default=None,  # for runs that were stored before the key existed, as above
        description="side whose captions inference.server writes; null: none",
    )


class ReportParameters(ParameterGroup):
    """How the pages, the adapter's card and the terminal's summary are written."""

    language: Literal["auto", "en", "zh"] = Field(
        description="English or Chinese; auto is Chinese where at least half of the captions are"
    )


class SwanLabParameters(ParameterGroup):
    """SwanLab's settings, by swanlab.init's own names. The API key is not a parameter: see SWANLAB_API_KEY."""

    mode: Literal["auto", "offline", "local", "online", "disabled"] = Field(
        description="only online, and auto if SWANLAB_API_KEY is set, send data off the machine"
    )
    project: str = Field(pattern=r"^[0-9a-zA-Z_\-+.]{1,100}$", description="letters, digits and _ - + .")
    experiment_name: str | None = Field(min_length=1, max_length=512, description="null is the id of the run")
    workspace: str | None = Field(pattern=r"^[0-9a-zA-Z_\-]{1,25}$", description="null is the workspace of the key")
    prediction_images: NonNegativeInt = Field(le=50, description="held-out pictures in the chart Prediction")


# Runs older than these two blocks lack them; their defaults, those of parameters.yml, let such runs be replayed.
class MLflowParameters(ParameterGroup):
    """MLflow's settings. A user name, password or token is not a parameter: see MLFLOW_TRACKING_TOKEN."""

    tracking_uri: str | None = Field(
        default=None, min_length=1, description="server; null takes conf/*/mlflow.yml, then MLFLOW_TRACKING_URI"
    )
    experiment: str | None = Field(
        default=None, min_length=1, max_length=500, description="null takes conf/*/mlflow.yml, then qwen-vl-lora"
    )
    prediction_images: NonNegativeInt = Field(default=8, le=50, description="held-out pictures that are sent")


class TensorBoardParameters(ParameterGroup):
    """TensorBoard's settings."""

    prediction_images: NonNegativeInt = Field(default=8, le=50, description="held-out pictures that are stored")


TrackerName = Literal["swanlab", "mlflow", "tensorboard"]


_SHARD_UNITS = {"KB": 3, "MB": 6, "GB": 9, "TB": 12}
_SHARD_SIZE = re.compile(r" *(?P<number>[0-9]{1,15}(\.[0-9]+)?) *(?P<unit>[KMGT]B) *", re.IGNORECASE | re.ASCII)
"""The sizes that huggingface_hub can parse."""


class ExportParameters(ParameterGroup):
    """How the merged model is written."""

    dtype: Literal["base", "bfloat16", "float16", "float32"] = Field(description="base keeps the base model's")
    max_shard_size: str = Field(description="largest size of one safetensors file, in transformers' notation")

    @field_validator("max_shard_size")
    @classmethod
    def _size_can_be_read(cls, text: str) -> str:
        size = _SHARD_SIZE.fullmatch(text)
        if size is None or float(size["number"]) * 10 ** _SHARD_UNITS[size["unit"].upper()] < 1:
            near = f"; nearest: {text.replace('i', '')}" if _SHARD_SIZE.fullmatch(text.replace("i", "")) else ""
            raise ValueError(f"expected a size above 0 in KB, MB, GB or TB, such as 5GB; got {text!r}{near}")
        return text


_OTHER_ACCELERATORS = {
    "mps": "Apple's GPUs",
    "xpu": "Intel's GPUs",
    "npu": "Ascend's accelerators",
    "hpu": "Gaudi's accelerators",
    "mlu": "Cambricon's accelerators",
    "musa": "Moore Threads' GPUs",
    "tpu": "TPUs",
}


_RECORDED = (
    "image",
    "generation",
    "max_length",
    "vision",
    "rows",
    "attention",
    "quantization",
    "lora",
    "training_args",
)


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
    attention: Literal["sdpa", "flash_attention_2", "flex_attention"]
    quantization: Literal["nf4", "int8"] | None = Field(description="format of the language model's frozen weights")
    init_adapter: str | None = Field(min_length=1, description="path or version of an adapter to continue training")
    cluster: ClusterParameters
    generation: GenerationParameters
    scoring: ScoringParameters
    # These defaults are for runs that were stored before the blocks existed.
    evaluation: EvaluationParameters = Field(default_factory=EvaluationParameters)
    report: ReportParameters = Field(default_factory=lambda: ReportParameters(language="auto"))
    trackers: list[TrackerName] = Field(default=["swanlab"], description="where a run is shown; [] is nowhere")
    swanlab: SwanLabParameters
    mlflow: MLflowParameters = Field(default_factory=MLflowParameters)
    tensorboard: TensorBoardParameters = Field(default_factory=TensorBoardParameters)
    inference: InferenceParameters
    export: ExportParameters

    recipe: str | None = Field(default=None, description="name of the data folders; from --params only")
    base_model: str | None = Field(default=None, description="path or hub id; from --params only")
    captions_file: str | None = Field(default=None, description="the user's own table or JSON; from --params only")
    image_folder: str | None = Field(default=None, description="folder of relative picture paths; from --params only")

    @property
    def is_quantized(self) -> bool:
        """Whether the language model's frozen weights are packed."""
        return self.quantization is not None

    @property
    def base_form(self) -> dict[str, Any]:
        """How the frozen base is held in memory: `dtype` and `quantization`."""
        return {"dtype": self.training_args.dtype, "quantization": self.quantization}

    @property
    def recorded(self) -> dict[str, Any]:
        """The blocks that an adapter's record states."""
        return self.model_dump(include=set(_RECORDED))

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

    @field_validator("trackers", mode="before")
    @classmethod
    def _trackers_are_a_list_of_different_names(cls, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(set(map(str, value))):
            raise ValueError(f"expected a list of different names, such as [swanlab, mlflow]; got {value!r}")
        return value

    @model_validator(mode="after")
    def _attention_can_do_what_is_asked(self) -> Self:
        if self.attention != "flash_attention_2":
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
    def _a_side_by_server_has_one(self) -> Self:
        if self.scoring.by_server is not None and not self.inference.server.addresses:
            raise ValueError(
                f"scoring.by_server is `{self.scoring.by_server}`, but no server is named; set "
                "inference.server.address, or scoring.by_server: null"
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
    def _initial_weights_can_be_made(self) -> Self:
        start = self.lora.init_lora_weights
        if self.is_quantized and start in ("pissa", "olora", "orthogonal"):
            raise ValueError(
                f"lora.init_lora_weights is `{start}`, which needs the base's weights as they are, and quantization is "
                f"`{self.quantization}`, which packs them; set lora.init_lora_weights: gaussian, or quantization: null"
            )
        return self

    @model_validator(mode="after")
    def _sharding_can_do_what_is_asked(self) -> Self:
        if not self.training_args.is_sharded:
            return self
        if self.lora.modules_to_save:
            raise ValueError(
                "training_args.fsdp with lora.modules_to_save was not tested here; remove lora.modules_to_save, or set "
                "training_args.fsdp: false"
            )
        if self.vision == "adapted":
            raise ValueError(
                "training_args.fsdp makes all processes gather each layer together, and a pass without pictures would "
                "skip the adapted tower's; set vision: frozen, or training_args.fsdp: false"
            )
        if self.is_quantized:
            raise ValueError(
                f"quantization is `{self.quantization}`, whose packed weights were never sharded here; set "
                "quantization: null, or training_args.fsdp: false"
            )
        if self.cluster.processes == 1:
            raise ValueError(
                "training_args.fsdp shards weights among processes, but there is only one; raise "
                "cluster.processes, or set training_args.fsdp: false"
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
        ParameterError: with one line for every fault: the key, the values that it allows and the value that it got.
    """
    try:
        return Parameters.model_validate(tree)
    except ValidationError as error:
        faults = "\n".join(f"  {_describe(fault)}" for fault in error.errors())
        raise ParameterError(
            f"Invalid parameters (conf/*/parameters.yml and --params), {error.error_count()} in all; nothing was run:\n"
            f"{faults}\nSee docs/parameters.md for every key."
        ) from error


_RENAMED = {
    "launcher": "its keys are now cluster.processes (nproc_per_node × nnodes, in all), cluster.address (auto or "
    "HOST:PORT of a Ray cluster, in place of rdzv_endpoint and `qwen-vl-lora worker`) and cluster.timeout"
}

_QUOTED = re.compile(r"'([^']*)'")
"""The allowed values in a message of pydantic."""


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("constrained-", "literal[")))
    got = fault["input"]
    if fault["type"] == "extra_forbidden":
        group = _group_at(fault["loc"][:-1])
        if issubclass(group, LibraryGroup):
            return f"{key}: {group.why_refused(str(fault['loc'][-1]))}."
        if key in _RENAMED:
            return f"{key}: {_RENAMED[key]}."
        known = set(group.model_fields)
        return f"{key}: unknown key{nearest(str(fault['loc'][-1]), known)}. Allowed: {', '.join(sorted(known))}."
    if fault["type"] == "library_name":
        return f"{key}.{fault['ctx']['name']}: {fault['ctx']['fault']}."
    if fault["type"] == "missing":
        return f"{key}: required, but not given."
    if fault["type"] == "value_error":
        return f"{key + ': ' if key else ''}{fault['ctx']['error']}."
    shown = got if not isinstance(got, float) or math.isfinite(got) else str(got)
    near = nearest(got, set(_QUOTED.findall(fault["msg"]))) if isinstance(got, str) else ""
    return f"{key}: {fault['msg']}; got {shown!r}{near}."


def _group_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    group: type[BaseModel] = Parameters
    for part in location:
        if isinstance(part, int):  # a place in a list
            continue
        annotation: Any = group.model_fields[part].annotation
        blocks = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        inner = next((kind for kind in blocks if issubclass(kind, BaseModel)), None)
        if inner is None:
            break
        group = inner
    return group
