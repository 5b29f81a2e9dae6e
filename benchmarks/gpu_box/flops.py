"""MFU is model FLOPs / (seconds x peak FLOPs), counted for the plain method on both sides.

What is not computed at all (vision in every epoch, prompts of shared rows, recomputation) then does not count as work
of the side that leaves it out:

    FLOPs = epochs x (4 N T + 4 H V S) + 2 M P

N parameters of the language model's layers, T tokens of the training set (2 N T forward, 2 N T for the
gradient of activations; LoRA's own, 6 % of N on 2B and 2 % on 7B, are left out), H hidden size,
V vocabulary, S scored tokens (the head where it must be computed), M parameters of the tower, P patches,
forward once. The attention matrix itself is left out: at 140 tokens it is below 1 %.
"""

from __future__ import annotations

from benchmarks.measuring import Record
from benchmarks.replica import GEOMETRIES, Geometry
from benchmarks.workloads import Workload


def utilization(job: Workload, run: Record, peak_tflops: float) -> Record:
    """MFU of a run's training loop by the formula above, and its samples a second."""
    patches = job.images * (job.side // 14) ** 2
    counted = run["check"]
    flops = model_flops(GEOMETRIES[job.base], job.epochs, counted["tokens"], counted["scored_tokens"], patches)
    mfu = flops / (run["train_s"] * peak_tflops * 1e12)
    rate = job.images * job.epochs / run["train_s"]
    return {"model_flops": flops, "mfu": round(mfu, 4), "samples_per_second": round(rate, 2)}


def model_flops(geometry: Geometry, epochs: int, tokens: int, scored: int, patches: int) -> float:
    """FLOPs of a whole training, by the formula above."""
    language = geometry.layers * _layer_parameters(geometry)
    tower = geometry.vision_depth * _vision_layer_parameters(geometry)
    head = geometry.hidden * geometry.vocabulary
    return float(epochs * (4 * language * tokens + 4 * head * scored) + 2 * tower * patches)


def _layer_parameters(geometry: Geometry) -> int:
    """Query and output, key and value, three projections of the MLP."""
    hidden = geometry.hidden
    key_value = hidden // geometry.heads * geometry.key_value_heads
    return 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * geometry.intermediate


def _vision_layer_parameters(geometry: Geometry) -> int:
    """Attention (4 w²) and MLP: 8 w² on Qwen2-VL, three projections on Qwen2.5-VL."""
    width = geometry.vision_width
    mlp = 8 * width * width if geometry.vision_intermediate is None else 3 * width * geometry.vision_intermediate
    return 4 * width * width + mlp
