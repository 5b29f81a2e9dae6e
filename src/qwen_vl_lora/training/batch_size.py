"""`per_device_train_batch_size: auto`: the most captions of one forward pass that fit in memory.

The optimizer step keeps its size; only its division into forward passes is chosen here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional

from qwen_vl_lora.cluster import here
from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.runs.storage import write_whole
from qwen_vl_lora.training.collator import ForwardPass, RowCollator, to_device
from qwen_vl_lora.training.memory import PACKED_BASE
from qwen_vl_lora.training.rows import fullest_pass, longest

logger = logging.getLogger(__name__)

CHOICE_FILE = "batch_size"

# Share of the free memory; the rest is for the optimizer, the allocator's gaps and other processes.
_CPU_SHARE, _CUDA_SHARE = 0.5, 0.9


def choose_batch_size(
    model: Any,
    conversations: Sequence[EncodedConversation],
    collator: RowCollator,
    rows: Literal["shared", "separate"],
    most: int,
    job_folder: Path,
) -> int:
    """Captions of one forward pass. The first choice is kept, so that a resumed run divides its steps alike.

    Args:
        conversations: the training set; its longest conversations decide.
        most: captions of one optimizer step on this device. Ranks use the smallest of their choices.
        job_folder: where the choice is kept.

    Raises:
        DeviceError: if a single caption does not fit.
    """
    note = job_folder / CHOICE_FILE
    known = int(note.read_text()) if note.is_file() else None
    size = known or _largest_that_fits(model, conversations, collator, rows, most)
    size = int(min(told[0] for told in here.gather([size], "choosing the batch size")))
    if known is None and here.is_first():
        logger.info("per_device_train_batch_size: auto is %d (an optimizer step holds %d).", size, most)
        write_whole(note, str(size))
    return size


def _largest_that_fits(
    model: Any,
    conversations: Sequence[EncodedConversation],
    collator: RowCollator,
    rows: Literal["shared", "separate"],
    most: int,
) -> int:
    tried = longest(conversations, most)
    size = most
    while size >= 1:
        if _fits(model, collator(fullest_pass(tried, rows, size))):
            return size
        size //= 2
    raise DeviceError(
        f"One caption of {len(tried[0].ids)} tokens does not fit in memory ({_free_bytes(model.device) / 2**30:.1f} "
        f"GiB free). Lower the image size or lora.r, set gradient_checkpointing: true, use bf16, or {PACKED_BASE}."
    )


def _fits(model: Any, forward: ForwardPass) -> bool:
    if model.device.type == "cpu":
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return _saved_bytes(model, forward) <= _CPU_SHARE * _free_bytes(model.device) / ranks_here
    torch.cuda.reset_peak_memory_stats()  # the peak of loading includes the vision tower
    try:
        _run(model, forward)
        return (
            torch.cuda.max_memory_allocated()
            <= _CUDA_SHARE * torch.cuda.get_device_properties(model.device).total_memory
        )
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _run(model: Any, forward: ForwardPass) -> None:
    """One forward and backward pass that restores the random state."""
    model.train()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        logits = model(**to_device(forward.inputs, model.device), use_cache=False).logits
        rows, columns = forward.source.to(model.device)
        functional.cross_entropy(logits[rows, columns].float(), forward.labels.to(model.device)).backward()


def _saved_bytes(model: Any, forward: ForwardPass) -> int:
    """Bytes that the pass keeps for its backward. Without memory on a CPU the kernel kills the process."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _run(model, forward)
    model.zero_grad()
    return sum(kept.values())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if Path("/proc/meminfo").is_file() else []
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return free[0] if free else 8 * 2**30
