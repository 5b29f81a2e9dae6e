"""`make bench-gpu`: the tutorials' job at full size, random weights, against the same method on the same GPU.

    python -m benchmarks.gpu [--only 2b,7b] [--repeats N] [--peak-tflops 989]
    python -m benchmarks.gpu --quick --out /tmp/quick    # toy sizes on a CPU: shows that everything runs

Each side runs in a process of its own, with everything of `bench`: fresh caches, checks, medians.
MFU is model FLOPs / (seconds x peak FLOPs), counted for the plain method on both sides, so that
what is not computed at all (vision in every epoch, prompts of shared rows, recomputation) does not
count as work of the side that leaves it out:

    FLOPs = epochs x (4 N T + 4 H V S) + 2 M P

N parameters of the language model's layers, T tokens of the training set (2 N T forward, 2 N T for the
gradient of activations; LoRA's own, 6 % of N on 2B and 2 % on 7B, are left out), H hidden size,
V vocabulary, S scored tokens (the head where it must be computed), M parameters of the tower, P patches,
forward once. The attention matrix itself is left out: at 140 tokens it is below 1 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks.bench import RESULTS, render_table, results_name
from benchmarks.jobs import write_json
from benchmarks.machine import current_commit, describe_gpu, describe_machine, versions
from benchmarks.measuring import PROJECT, SIDES, Bench, Record
from benchmarks.replica import GEOMETRIES, Geometry
from benchmarks.workloads import Workload

H200_BF16_TFLOPS = 989
"""Dense bf16 peak of an H100 or H200 SXM, from NVIDIA's data sheet."""

JOBS = {
    # 496 samples, 2 epochs, 62 steps: the tutorials' headline job.
    "2b": Workload(
        "GPU_2b",
        "train",
        base="2b",
        images=496,
        checkpointing=True,
        min_ratio=4,
        max_memory=0.5,
        tolerance=0.02,
        dtype="bfloat16",
        device="cuda",
    ),
    # The 7B tutorial's settings on as many samples as the headline job.
    "7b": Workload(
        "GPU_7b",
        "train",
        base="7b",
        images=496,
        epochs=5,
        checkpointing=True,
        side=252,
        min_ratio=4,
        max_memory=0.5,
        tolerance=0.02,
        dtype="bfloat16",
        device="cuda",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen jobs; gives 1 when a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", default="2b,7b", help="2b, 7b or both")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, default=H200_BF16_TFLOPS, help="dense bf16 peak of the GPU")
    parser.add_argument("--quick", action="store_true", help="toy sizes on a CPU, which measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    machine = describe_machine() if options.quick else f"{describe_gpu()}; {describe_machine()}"
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "threads": 1 if options.quick else 8}
    results |= {"versions": versions(), "peak_tflops": options.peak_tflops, "workloads": {}}
    file = options.out / f"{results_name(machine)}{'-quick' if options.quick else ''}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-bench-") as root:
        bench = Bench(Path(root), results["threads"])
        for name in options.only.split(","):
            job = replace(JOBS[name].toy(), dtype="float32", device="cpu") if options.quick else JOBS[name]
            *_, measured = bench.measure(job, options.repeats)
            results["workloads"][job.key] = {**measured, **utilization(job, measured, options.peak_tflops)}
            write_json(file, results)
            file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    print(render_table(results))
    for key, entry in results["workloads"].items():
        print(f"{key}: MFU of the training loop {entry['mfu']}, training seconds {entry['train_s']}")
    return 1 if any(entry["checks"]["failures"] for entry in results["workloads"].values()) else 0


def utilization(job: Workload, measured: Record, peak_tflops: float) -> Record:
    """MFU of each side's training loop by the formula above, with the seconds it is made of."""
    first = measured["checks"]["baseline_first"]
    patches = job.images * (job.side // 14) ** 2
    flops = model_flops(GEOMETRIES[job.base], job.epochs, first["tokens"], first["scored_tokens"], patches)
    seconds = {side: median(run["train_s"] for run in measured["runs"][side]) for side in SIDES}
    mfu = {side: round(flops / (seconds[side] * peak_tflops * 1e12), 4) for side in SIDES}
    return {"train_s": seconds, "model_flops": flops, "mfu": mfu}


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


if __name__ == "__main__":
    sys.exit(main())
