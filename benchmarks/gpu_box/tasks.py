"""What a part does in a process of its own: see `benchmarks.worker`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import project
from benchmarks.jobs import Job
from benchmarks.measuring import UNTRAINED_TOLERANCE, Record
from benchmarks.project import train  # noqa: F401 -- a task, whose `check` is the one below
from qwen_vl_lora.features.fast_tower import PatchProduct
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import Parameters

COMPARED = 2
SHARED_ROWS, PROMPT, ANSWERS, ANSWER = 8, 125, 5, 14
"""Rows of the attention that is measured: a picture of 280x280 and a question, five captions."""

PATCHES = 16 * 400
"""Of sixteen pictures of 280x280."""


def check(job: Job) -> Record:
    """What must be equal on both sides, and the plan's prediction of the peak."""
    return {**project.check(job), "planned_mb": planned_mb(job)}


def planned_mb(job: Job) -> float:
    """What `plan` says torch will allocate; with batch size `auto` for as many captions as a step has."""
    from qwen_vl_lora.training.memory import MemoryModel, largest_pass

    settings = Parameters.model_validate(job.parameters)
    per_step, size = settings.training_args.captions_per_step, settings.training_args.per_device_train_batch_size
    encoded = project.encode_conversations(job)
    shape = largest_pass(encoded, settings.rows, per_step, per_step if size == "auto" else size)
    model = MemoryModel.of(BaseModel(name="base", path=job.base_path).geometry, settings)
    return round(model.peak(shape) / 2**20, 1)


def compare_precisions(job: Job) -> Record:
    """The untrained loss of two samples in bfloat16 on the device, and in float32 on the CPU."""
    parameters = Parameters.model_validate(job.parameters)
    base = BaseModel(name="base", path=job.base_path)
    places = {"device": (parameters.device, True), "cpu": ("cpu", False)}
    losses = {}
    for name, (device, bf16) in places.items():
        there = replace(job, options={**job.options, "changes": {"device": device, "training_args": {"bf16": bf16}}})
        project.encode(there, project.open_images(job.data, "train"), project.open_workspace(there))
        losses[name] = project.untrained_loss(there, project.encode_conversations(there)[:COMPARED])
    difference = abs(losses["device"] - losses["cpu"]) / losses["cpu"]
    bound = UNTRAINED_TOLERANCE["bfloat16"]
    failures = [f"the losses differ by {difference:.3%}, allowed {bound:.0%}"] if difference > bound else []
    told = {"parameters": base.geometry.parameters, "device": parameters.device, "losses": losses}
    return {**told, "relative_difference": difference, "bound": bound, "failures": failures}


def train_and_kill(job: Job) -> Record:
    """Train, and kill this process as soon as the checkpoint of the first step is whole."""
    jobs = project.open_workspace(job).path / "training"

    def watch() -> None:
        while not any(jobs.glob("*/checkpoint-1")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    project.train(job)
    raise RuntimeError("The training ended before its first checkpoint was seen.")


def attention(job: Job) -> Record:
    """FlexAttention with a block mask beside SDPA with a dense one, on shared rows: `options` has the head geometry.

    Without a GPU forward only and not compiled, which tells nothing of the speed.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    heads, key_values, width = (job.options[name] for name in ("heads", "key_value_heads", "head_width"))
    on_gpu = job.parameters["device"] == "cuda"
    device, dtype = job.parameters["device"], torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    answer_of = torch.cat([torch.zeros(PROMPT), torch.arange(1, ANSWERS + 1).repeat_interleave(ANSWER)]).to(device)
    length = len(answer_of)

    def may_see(_row: Any, _head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & ((answer_of[key] == 0) | (answer_of[key] == answer_of[query]))

    positions = torch.arange(length, device=device)
    dense = may_see(None, None, positions[:, None], positions[None, :])
    blocks = create_block_mask(may_see, None, None, length, length, device=device)
    shapes = ((heads, "queries"), (key_values, "keys"), (key_values, "values"))
    parts = [torch.randn(SHARED_ROWS, count, length, width, device=device, dtype=dtype) for count, _ in shapes]
    flex = torch.compile(flex_attention) if on_gpu else flex_attention
    ways: dict[str, Callable[..., Any]] = {
        "dense": lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True),
        "flex": lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True),
    }
    found: dict[str, list[torch.Tensor]] = {}
    times: Record = {}
    for name, way in ways.items():
        with torch.set_grad_enabled(on_gpu):
            leaves = [part.clone().requires_grad_(on_gpu) for part in parts]
            output = way(*leaves)
            times[f"{name}_forward_ms"] = milliseconds(lambda way=way, leaves=leaves: way(*leaves))
            gradients = _backward(output, leaves) if on_gpu else []
            found[name] = [output.detach(), *gradients]
            if on_gpu:
                both = milliseconds(lambda way=way, leaves=leaves: _backward(way(*leaves), leaves))
                times[f"{name}_forward_and_backward_ms"] = both
    return {**times, **_differences(found), "rows": SHARED_ROWS, "tokens": length, "dtype": str(dtype)}


def _backward(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output, leaves, torch.ones_like(output)))


def _differences(found: dict[str, list[torch.Tensor]]) -> Record:
    """Largest differences of the second way's tensors from the first's, relative to the largest value there."""
    (first, second), names = found.values(), ("output", "queries", "keys", "values")
    pairs = zip(names, first, second, strict=False)
    return {f"{name}_differs_by": float((a - b).abs().max() / a.abs().max()) for name, a, b in pairs}


def patch_embedding(job: Job) -> Record:
    """The tower's Conv3d beside the equal matrix product: `options.width` is the tower's."""
    on_gpu = job.parameters["device"] == "cuda"
    torch.manual_seed(0)
    kernel = (2, 14, 14)
    convolution = nn.Conv3d(3, job.options["width"], kernel, stride=kernel, bias=False)
    convolution = convolution.to(job.parameters["device"], torch.bfloat16 if on_gpu else torch.float32)
    weight = convolution.weight
    count = PATCHES if on_gpu else PATCHES // 100
    patches = torch.randn(count, *weight.shape[1:], device=weight.device, dtype=weight.dtype)
    product = PatchProduct(convolution)
    with torch.inference_mode():
        found = {"convolution": [convolution(patches).flatten(1)], "product": [product(patches)]}
        times = {
            f"{way}_ms": milliseconds(lambda call=call: call(patches))
            for way, call in (("convolution", convolution), ("product", product))
        }
    return {**times, **_differences(found), "patches": count, "width": job.options["width"]}


def milliseconds(work: Callable[[], object]) -> float:
    """Median time of a call; on a GPU until it has finished."""
    from torch.utils.benchmark import Timer

    timer = Timer("work()", globals={"work": work})
    return round(1000 * timer.blocked_autorange(min_run_time=0.5).median, 4)
