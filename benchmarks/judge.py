"""One judge for both adapters: their tensors, and their loss on held-out pictures, computed the plain way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoProcessor

from benchmarks import tutorial
from benchmarks.jobs import Job
from qwen_vl_lora.model.fingerprints import stored_tensors


def judge(job: Job) -> dict[str, Any]:
    """Compare `options.adapters`, a directory for each side.

    Returns:
        `tensors_equal`, `trainable_tensors`, `trainable_parameters`, `validation_loss` of each side,
        and that of the base, which shows whether training moved it at all.
    """
    adapters = {side: Path(path) for side, path in job.options["adapters"].items()}
    shapes = {side: _shapes(path) for side, path in adapters.items()}
    mapper = tutorial.RowMapper(AutoProcessor.from_pretrained(job.base_path), job.parameters)
    rows = [mapper(record) for record in job.conversations("validation")]
    collate = tutorial.PaddedRows(mapper.processor)
    losses = {}
    for side, path in adapters.items():
        model = PeftModel.from_pretrained(tutorial.load_base(job), path).eval()
        losses[side] = tutorial.mean_loss(model, collate, rows)
        with model.disable_adapter():
            losses["base"] = tutorial.mean_loss(model, collate, rows)
    first = next(iter(shapes.values()))
    return {
        "tensors_equal": all(other == first for other in shapes.values()),
        "trainable_tensors": len(first),
        "trainable_parameters": sum(math.prod(shape) for shape in first.values()),
        "validation_loss": losses,
    }


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in stored_tensors(adapter / "adapter_model.safetensors")}
