"""What a training will need, computed in advance without a GPU or weights. Nothing is written.

Training's own code plans rows and forward passes, so samples, steps and token counts are exact for the given
conversations. Memory is `training.memory`'s estimate. Time is the number of samples over the throughput, or the rough
estimate of `training.duration`; the other stages take the speed that earlier runs had (`training.stages`).
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen_vl_lora.exceptions import DataFormatError, DeviceError
from qwen_vl_lora.model.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.model.families import Family
from qwen_vl_lora.model.geometry import Geometry
from qwen_vl_lora.model.lora_checks import missed_linear_attention
from qwen_vl_lora.model.pictures import PictureSizer
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.conversations import Conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.training.duration import RoughTime, rough_times
from qwen_vl_lora.training.memory import (
    BYTES_OF_DTYPE,
    CONTEXT_BYTES,
    PACKED_BASE,
    Change,
    MemoryModel,
    changes,
    largest_pass,
)
from qwen_vl_lora.training.rows import StepSampler, check_rows, group_rows, share_groups
from qwen_vl_lora.training.stages import FeatureUse, Pace, Stage, Within, feature_use, processes_within, stages_of

MOST_SIZES = 8
"""Most batch sizes that a plan lists: powers of two up to a step's captions."""


_DOUBT = 0.11
"""Largest relative difference between measured peaks and the estimate: see docs/full-size.md."""

_MOST_CHECKED = 256
"""Most conversations that the memory check parses and encodes, unless a step has more: it bounds its time."""


@dataclass(frozen=True)
class PlannedBase:
    """The facts about a base that a plan needs.

    Attributes:
        name: as configured.
        processor: its own, or a stand-in if the base is not on this machine.
        is_here: whether the base is on this machine.
        download_bytes: size of the download.
    """

    name: str
    family: Family
    geometry: Geometry
    processor: Any
    is_here: bool
    download_bytes: int


@dataclass(frozen=True)
class PlannedData:
    """Conversations by split, their pictures, and the name of their origin."""

    train: Sequence[Conversation]
    validation: Sequence[Conversation]
    test: Sequence[Conversation]
    images: ImageStore
    origin: str
    rejected: int


@dataclass(frozen=True)
class Spread:
    """The distribution of a count over samples or pictures."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, counts: Sequence[int]) -> Spread:
        ordered = sorted(counts)
        last = len(ordered) - 1
        return cls(ordered[0], round(statistics.median(ordered)), ordered[round(0.95 * last)], ordered[last])


@dataclass(frozen=True)
class BatchNeed:
    """The memory for a number of captions in one forward pass.

    Attributes:
        tokens: of the largest pass, padding included.
        allocated: as torch counts it.
        needed: with the allocator's gaps and CUDA's context.
        fits: whether the given GPU has it free; None without a GPU.
        is_configured: whether it is the size of the parameters.
    """

    batch_size: int
    tokens: int
    allocated: int
    needed: int
    fits: bool | None
    is_configured: bool


@dataclass(frozen=True)
class Speed:
    """Samples per second, the source of the figure, and the processes that reached it: None for those of the plan."""

    samples_per_second: float
    source: str
    processes: int | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that `qwen-vl-lora plan` shows; sizes in bytes.

    Attributes:
        tokens_are_estimated: whether the base's tokenizer is missing on this machine.
        steps: optimizer steps of the whole training.
        tokens: of training samples, including those that are too long.
        too_long: ids of samples that `max_length` leaves out.
        stops_on_too_long: whether those are more than `quarantine.max_share`.
        image_tokens: of one picture.
        stored_pictures: copies of pictures; 0 with `image.storage: reference`.
        features: stored image features of all splits.
        adapter: one adapter; a checkpoint has about three times its size.
        feature_use: whether storing features pays; None without pictures or with `vision: adapted`.
        changes: settings that need less memory, if the configured size does not fit.
        seconds: of training alone, without encoding and evaluation; None without a speed.
        rough_times: estimates for usual GPUs, without a speed.
        stages: the time of each node that takes long, with the configured processes.
        within: processes that are enough for a given time.
    """

    base: str
    base_is_here: bool
    download: int
    data: str
    rejected_rows: int
    samples: dict[str, int]
    pictures: int
    tokens_are_estimated: bool
    samples_per_step: int
    steps: int
    tokens: Spread
    too_long: list[str]
    stops_on_too_long: bool
    image_tokens: Spread | None
    stored_pictures: int
    features: int
    adapter: int
    feature_use: FeatureUse | None
    trainable_parameters: int
    dtype: str
    memory: list[BatchNeed]
    gpu_memory: int | None
    changes: list[Change]
    speed: Speed | None
    seconds: float | None
    rough_times: list[RoughTime]
    stages: list[Stage]
    within: Within | None
    notes: list[str]


def make_plan(
    base: PlannedBase,
    data: PlannedData,
    parameters: Parameters,
    gpu_memory: int | None,
    speed: Speed | None,
    paces: Mapping[str, Pace],
    within: float | None = None,
) -> Plan:
    """Compute the plan of a training.

    Args:
        gpu_memory: bytes of the GPU that the training should fit in.
        speed: throughput for the time estimate.
        paces: the speed of the other nodes, by name.
        within: seconds that all stages may take, for the number of processes.

    Raises:
        DataFormatError: if there is nothing to train on.
        ParameterError: if the base cannot be trained with `rows: shared`.
    """
    encoder = ChatEncoder(base.processor, parameters.image, data.images)
    encoded = [encoder.encode(conversation) for conversation in data.train]
    train = [item for item in encoded if len(item.ids) <= parameters.max_length]
    if not train:
        raise DataFormatError(
            f"None of {len(encoded)} training samples ({data.origin}) fits in max_length {parameters.max_length}. "
            "Take more rows, raise max_length or lower the image size."
        )
    check_rows(train, parameters.rows, base.family)
    arguments, frozen = parameters.training_args, parameters.vision == "frozen"
    token_bytes = base.geometry.feature_levels * base.geometry.hidden * BYTES_OF_DTYPE[arguments.dtype]
    images = [encoder.sizer.num_tokens(encoder.sizer.grid(entry.width, entry.height)) for entry in data.images]
    model = MemoryModel.of(base.geometry, parameters)
    needs, lighter = _needs(model, train, parameters, gpu_memory)
    per_step = arguments.captions_per_step * _ranks(parameters)
    steps = _steps(train, parameters, per_step)
    captions = steps / -(-len(train) // per_step) * len(train)
    long = [item.id for item in encoded if len(item.ids) > parameters.max_length]
    if speed is not None:
        pace = Pace(speed.samples_per_second / (speed.processes or _ranks(parameters)), speed.source)
        paces = {**paces, "train_adapter": pace}
    stages = stages_of(_counts(data, round(captions), parameters), paces, _ranks(parameters))
    return Plan(
        base=base.name,
        base_is_here=base.is_here,
        download=0 if base.is_here else base.download_bytes,
        data=data.origin,
        rejected_rows=data.rejected,
        samples={"train": len(train), "validation": len(data.validation), "test": len(data.test)},
        pictures=len(data.images),
        tokens_are_estimated=not base.is_here,
        samples_per_step=per_step,
        steps=steps,
        tokens=Spread.of([len(item.ids) for item in encoded]),
        too_long=long,
        stops_on_too_long=len(long) > parameters.quarantine.max_share * len(encoded),
        image_tokens=Spread.of(images) if images else None,
        stored_pictures=sum(entry.bytes for entry in data.images) if parameters.image.storage == "copy" else 0,
        features=sum(images) * token_bytes if frozen else 0,
        adapter=model.lora_parameters * BYTES_OF_DTYPE["float32"],
        feature_use=_feature_use(train, parameters, captions / len(train), len(data.images), paces),
        trainable_parameters=model.lora_parameters,
        dtype=arguments.dtype,
        memory=needs,
        gpu_memory=gpu_memory,
        changes=lighter,
        speed=speed,
        seconds=next(stage.seconds for stage in stages if stage.name == "train_adapter"),
        rough_times=[] if speed else rough_times(model, train, parameters, steps, _asked(needs, parameters).needed),
        stages=stages,
        within=None if within is None else processes_within(within, stages),
        notes=_notes(parameters, base.family, encoder.sizer),
    )


def check_memory(base: PlannedBase, data: PlannedData | None, parameters: Parameters, gpu_memory: int) -> None:
    """Refuse a training whose estimate is clearly above the GPU's memory.

    Args:
        data: the `longest` training data; None, before they exist, counts base and adapter only.
        gpu_memory: bytes of the GPU.

    Raises:
        DeviceError: with the settings that need less.
    """
    if parameters.training_args.is_sharded:
        return
    model = MemoryModel.of(base.geometry, parameters)
    needs, lighter = _needs(model, _fitting(base, data, parameters), parameters, gpu_memory) if data else ([], [])
    asked = next((need for need in needs if need.is_configured), needs[0] if needs else None)
    estimate = asked.allocated if asked else model.weights + 12 * model.lora_parameters
    if estimate * (1 - _DOUBT) + CONTEXT_BYTES <= gpu_memory:
        return
    lines = [f"  {change.setting}: {change.bytes / 2**30:.1f} GiB" for change in lighter if change.bytes <= gpu_memory]
    remedies = "\n".join(["What fits:", *lines]) if lines else f"Use {PACKED_BASE}, a smaller base or a larger GPU."
    raise DeviceError(
        f"The training of {base.name} needs an estimated {(estimate + CONTEXT_BYTES) / 2**30:.1f} GiB of GPU memory; "
        f"this GPU has {gpu_memory / 2**30:.1f} GiB. `qwen-vl-lora plan` shows the estimate. {remedies}"
    )


def longest(records: Sequence[dict[str, Any]], parameters: Parameters) -> list[dict[str, Any]]:
    """The stored conversations with the longest texts, enough for the largest pass of `check_memory`."""
    most = max(_MOST_CHECKED, parameters.training_args.captions_per_step)
    return heapq.nlargest(most, records, key=lambda record: len(str(record)))


def _fitting(base: PlannedBase, data: PlannedData, parameters: Parameters) -> list[EncodedConversation]:
    encoder = ChatEncoder(base.processor, parameters.image, data.images)
    encoded = [encoder.encode(conversation) for conversation in data.train]
    return [item for item in encoded if len(item.ids) <= parameters.max_length] or encoded[-1:]


def _needs(
    model: MemoryModel, train: Sequence[EncodedConversation], parameters: Parameters, gpu_memory: int | None
) -> tuple[list[BatchNeed], list[Change]]:
    """Memory by captions of one forward pass, and changes if the configured number does not fit."""
    per_step, configured = (
        parameters.training_args.captions_per_step,
        parameters.training_args.per_device_train_batch_size,
    )
    shape_of = partial(largest_pass, train, parameters.rows, per_step)
    sizes = {1 << power for power in range(MOST_SIZES) if 1 << power <= per_step} | {per_step}
    sizes |= set() if configured == "auto" else {configured}
    needs = []
    for size in sorted(sizes):
        shape = shape_of(size)
        needed = model.needed(shape)
        fits = None if gpu_memory is None else needed <= gpu_memory
        needs.append(BatchNeed(size, shape.tokens, model.peak(shape), needed, fits, size == configured))
    asked = _asked(needs, parameters)
    if asked.fits is not False:
        return needs, []
    return needs, changes(model, shape_of, asked.batch_size, per_step)


def _asked(needs: Sequence[BatchNeed], parameters: Parameters) -> BatchNeed:
    """The configured size; `auto` may choose a single caption."""
    is_auto = parameters.training_args.per_device_train_batch_size == "auto"
    return needs[0] if is_auto else next(need for need in needs if need.is_configured)


def _ranks(parameters: Parameters) -> int:
    """Processes that share a step; `auto` depends on the machine and counts as one."""
    processes = parameters.cluster.processes
    return 1 if processes == "auto" else processes


def _steps(train: Sequence[EncodedConversation], parameters: Parameters, per_step: int) -> int:
    arguments = parameters.training_args
    sampler = StepSampler(share_groups(train, parameters.rows), per_step, arguments.seed)
    planned = -(-len(sampler) * arguments.num_train_epochs // 1)
    return int(planned if arguments.max_steps < 0 else arguments.max_steps)


def _counts(data: PlannedData, captions: int, parameters: Parameters) -> dict[str, int]:
    """What each node has to do, in its unit; `captions` are trained in all epochs together."""
    return {
        "collect_samples": len(data.train) + len(data.validation) + len(data.test) + data.rejected,
        "encode_images": len(data.images) if parameters.vision == "frozen" else 0,
        "train_adapter": captions,
        "generate_captions": 2 * len({conversation.turns[:-1] for conversation in data.test}),
    }


def _feature_use(
    train: Sequence[EncodedConversation],
    parameters: Parameters,
    epochs: float,
    num_pictures: int,
    paces: Mapping[str, Pace],
) -> FeatureUse | None:
    if parameters.vision == "adapted":
        return None
    rows = group_rows(train, parameters.rows, parameters.max_length)
    return feature_use(rows, epochs, num_pictures, paces.get("encode_images"))


def _notes(parameters: Parameters, family: Family, sizer: PictureSizer) -> list[str]:
    notes = [rounding] if (rounding := sizer.rounding()) else []
    if family.linear_attention:
        notes.append(
            f"{family.name}: memory is that of linear attention in plain torch; a GPU kernel for it needs less."
        )
    if missed := missed_linear_attention(family, parameters.lora):
        notes.append(missed)
    if parameters.cluster.processes == "auto":
        notes.append("cluster.processes: auto: steps are planned for one process.")
    if _ranks(parameters) > 1:
        notes.append(f"{_ranks(parameters)} processes: memory is per GPU, samples/s is for all together.")
    if parameters.vision == "adapted":
        notes.append("vision: adapted: the memory estimate lacks the tower's activations and is too low.")
    if parameters.lora.use_dora:
        notes.append("use_dora: the estimate lacks DoRA's temporary memory.")
    if parameters.lora.modules_to_save or parameters.lora.rank_pattern:
        notes.append("the estimate lacks lora.modules_to_save and lora.rank_pattern and may be too low.")
    if parameters.training_args.early_stopping_patience is not None:
        notes.append("early_stopping_patience may end the training sooner.")
    return notes
