"""What a training will take, computed before anything is trained: no GPU, no weights, nothing written.

Rows and forward passes are cut by the very code that training uses, so samples, steps and token counts are what will
be, given the conversations; memory is `tuning.memory`'s estimate; time is throughput times samples.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.modeling.chat import ChatEncoder, EncodedConversation
from qwen_vl_lora.modeling.geometry import Geometry
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.tuning.memory import BYTES_OF_DTYPE, Change, MemoryModel, changes, largest_pass
from qwen_vl_lora.tuning.rows import StepSampler, share_groups

MOST_SIZES = 8
"""Batch sizes that a plan lists: powers of two up to a step's captions."""


@dataclass(frozen=True)
class PlannedBase:
    """The base as a plan knows it.

    Attributes:
        name: what the configuration calls it.
        processor: its own, or the stand-in while it is not on this machine.
        is_here: whether it is.
        download_bytes: what a fetch would bring.
    """

    name: str
    geometry: Geometry
    processor: Any
    is_here: bool
    download_bytes: int


@dataclass(frozen=True)
class PlannedData:
    """Conversations by split, their pictures, and where they were read."""

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    test: Sequence[dict[str, Any]]
    images: ImageStore
    origin: str
    rejected: int


@dataclass(frozen=True)
class Spread:
    """Of a count over samples or pictures."""

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
    """A number of captions in one forward pass and what it takes.

    Attributes:
        tokens: of the largest pass, padding included.
        allocated: as torch counts it.
        needed: with the allocator's gaps and CUDA's context.
        fits: in the GPU that was named; None when none was.
        is_configured: the size that parameters say.
    """

    batch_size: int
    tokens: int
    allocated: int
    needed: int
    fits: bool | None
    is_configured: bool


@dataclass(frozen=True)
class Speed:
    """Samples a second, and who says so."""

    samples_per_second: float
    source: str


@dataclass(frozen=True)
class Plan:
    """Everything that `qwen-vl-lora plan` shows; sizes in bytes.

    Attributes:
        tokens_are_estimated: the base's tokenizer is not on this machine.
        steps: optimizer steps of the whole training.
        tokens: of training samples, those that are too long included.
        too_long: ids of samples that `max_length` leaves out.
        stops_on_too_long: whether those are more than `quarantine.max_share`.
        image_tokens: of one picture.
        features: stored image features of all splits.
        changes: what needs less, when the configured size does not fit.
        seconds: of training alone, without encoding and evaluation.
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
    features: int
    trainable_parameters: int
    dtype: str
    memory: list[BatchNeed]
    gpu_memory: int | None
    changes: list[Change]
    speed: Speed | None
    seconds: float | None
    notes: list[str]


def make_plan(
    base: PlannedBase, data: PlannedData, parameters: Parameters, gpu_memory: int | None, speed: Speed | None
) -> Plan:
    """Work a training through.

    Args:
        gpu_memory: bytes of the GPU that it should fit in.
        speed: throughput to compute the time with.

    Raises:
        DataFormatError: if there is nothing to train on.
    """
    sizer = PictureSizer.for_processor(base.processor, parameters.image)
    encoder = ChatEncoder(base.processor, sizer, data.images)
    encoded = [encoder.encode(parse_conversation(record)) for record in data.train]
    train = [item for item in encoded if len(item.ids) <= parameters.max_length]
    if not train:
        raise DataFormatError(
            f"None of {len(encoded)} training samples ({data.origin}) fits in max_length {parameters.max_length}. "
            "Take more rows, raise max_length or lower the image size."
        )
    arguments, frozen = parameters.training_args, parameters.vision == "frozen"
    images = [sizer.num_tokens(sizer.grid(entry.width, entry.height)) for entry in data.images]
    model = _memory_model(base.geometry, parameters)
    needs, lighter = _needs(model, train, parameters, gpu_memory)
    per_step = arguments.captions_per_step * _ranks(parameters)
    steps = _steps(train, parameters, per_step)
    captions = steps / -(-len(train) // per_step) * len(train)
    long = [item.id for item in encoded if len(item.ids) > parameters.max_length]
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
        features=sum(images) * base.geometry.hidden * BYTES_OF_DTYPE[arguments.dtype] if frozen else 0,
        trainable_parameters=model.lora_parameters,
        dtype=arguments.dtype,
        memory=needs,
        gpu_memory=gpu_memory,
        changes=lighter,
        speed=speed,
        seconds=captions / speed.samples_per_second if speed else None,
        notes=_notes(parameters),
    )


def _memory_model(geometry: Geometry, parameters: Parameters) -> MemoryModel:
    return MemoryModel.of(
        geometry,
        parameters.lora,
        parameters.training_args.dtype,
        checkpointing=parameters.training_args.gradient_checkpointing,
        quantization=parameters.quantization,
        tower=parameters.vision == "adapted",
    )


def _needs(
    model: MemoryModel, train: Sequence[EncodedConversation], parameters: Parameters, gpu_memory: int | None
) -> tuple[list[BatchNeed], list[Change]]:
    """Memory by captions of one forward pass, and what to change when the configured number does not fit."""
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
    # `auto` goes down to a single caption by itself.
    asked = needs[0] if configured == "auto" else next(need for need in needs if need.is_configured)
    if asked.fits is not False:
        return needs, []
    return needs, changes(model, shape_of, asked.batch_size, per_step)


def _ranks(parameters: Parameters) -> int:
    """Processes that share a step; `auto` depends on the machine and counts as one."""
    processes = parameters.launcher.nproc_per_node
    return parameters.launcher.nnodes * (1 if processes == "auto" else processes)


def _steps(train: Sequence[EncodedConversation], parameters: Parameters, per_step: int) -> int:
    arguments = parameters.training_args
    sampler = StepSampler(share_groups(train, parameters.rows), per_step, arguments.seed)
    planned = -(-len(sampler) * arguments.num_train_epochs // 1)
    return int(planned if arguments.max_steps < 0 else arguments.max_steps)


def _notes(parameters: Parameters) -> list[str]:
    notes = []
    if parameters.launcher.nproc_per_node == "auto":
        notes.append("launcher.nproc_per_node: auto: steps are planned for one process on each machine.")
    if _ranks(parameters) > 1:
        notes.append(f"{_ranks(parameters)} processes: memory is of each GPU, samples/s of all together.")
    if parameters.vision == "adapted":
        notes.append("vision: adapted: the tower's activations are not in the memory estimate, which is then too low.")
    if parameters.lora.use_dora:
        notes.append("use_dora: DoRA's own scratch memory is not in the estimate.")
    if parameters.training_args.early_stopping_patience is not None:
        notes.append("early_stopping_patience may end the training sooner.")
    return notes
