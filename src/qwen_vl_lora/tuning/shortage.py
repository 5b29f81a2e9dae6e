"""Memory that runs out in training, answered with the figures of this very training and what to set otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from qwen_vl_lora.exceptions import MachineError
from qwen_vl_lora.faults import is_out_of_memory, machine_fault, shown_bytes
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.modeling.geometry import Geometry
from qwen_vl_lora.tuning.memory import MemoryModel, changes, largest_pass
from qwen_vl_lora.tuning.settings import TrainingSettings


@contextmanager
def answered_shortage(
    base_model: BaseModel, train: Sequence[EncodedConversation], settings: TrainingSettings, batch_size: int
) -> Iterator[None]:
    """Turn a shortage of main or GPU memory into its message with figures; everything else passes.

    Raises:
        MachineError: if memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"{machine_fault(error)} {_figures(base_model, train, settings, batch_size)}") from error


def _figures(
    base_model: BaseModel, train: Sequence[EncodedConversation], settings: TrainingSettings, batch_size: int
) -> str:
    arguments = settings.training_args
    model = MemoryModel.of(
        Geometry.of_config(base_model.config),
        settings.lora,
        arguments.dtype,
        checkpointing=arguments.gradient_checkpointing,
        quantization=settings.quantization,
        mask_bytes=4 if settings.device == "cpu" else 1,
        tower=settings.vision == "adapted",
    )
    per_step = arguments.captions_per_step
    shape_of = partial(largest_pass, train, settings.rows, per_step)
    now = shape_of(batch_size)
    lighter = "; ".join(
        f"{change.setting}: {shown_bytes(change.bytes)}" for change in changes(model, shape_of, batch_size, per_step)
    )
    return (
        f"The largest forward pass of this training holds {batch_size} captions, {now.tokens} tokens, for which a GPU "
        f"needs about {shown_bytes(model.needed(now))} in all, {shown_bytes(model.weights)} of them for the base. "
        f"By the same estimate: {lighter}. `qwen-vl-lora plan` shows more."
    )
