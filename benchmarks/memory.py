"""Measured peaks of training steps beside `qwen-vl-lora plan`'s estimate, on whatever device is at hand.

    python -m benchmarks.memory [--bases replica] [--device cpu|cuda] [--dtypes float32] [--quantize nf4] [--out FOLDER]

A cell is one step of the project's own loop: model, adapter and AdamW are real and warm, pictures go in as
stored features. On a CPU torch's profiler counts every allocation and release, and what is compared is what the step
adds to weights, adapter and moments, which are known exactly; on a GPU torch's largest allocation, weights and all.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import Job, write_json
from benchmarks.machine import current_commit, describe_gpu, describe_machine, versions
from benchmarks.measuring import PROJECT, Record, report
from benchmarks.workloads import Workload

BATCHES = (1, 4)
CAPTIONS = (1, 5)
"""Captions of a picture: one gives plain rows, five shared ones with a mask."""

COUNTED_MASK_BYTES = {"cpu": 0, "cuda": 1}
"""Of a number's dropout mask: on a CPU numpy draws it, outside of what torch counts."""


@dataclass(frozen=True)
class Cell:
    """One way of training one base."""

    base: str
    dtype: str
    batch: int
    captions: int
    checkpointing: bool
    dropout: float = 0.05
    quantization: str | None = None
    side: int = 280

    @property
    def name(self) -> str:
        words = [
            self.base,
            self.dtype,
            *([self.quantization] if self.quantization else []),
            f"batch {self.batch}",
            f"{self.captions} captions",
        ]
        words += ["checkpointing"] if self.checkpointing else []
        return ", ".join([*words, *(["no dropout"] if not self.dropout else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the grid and write it down."""
    options = _parse(arguments)
    machine = f"{describe_gpu()}; {describe_machine()}" if options.device == "cuda" else describe_machine()
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "versions": versions(), "cells": {}}
    file = options.out / f"{results_name(machine)}-memory.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-memory-") as root:
        for cell in _grid(options):
            results["cells"][cell.name] = measure(cell, Path(root), options.device)
            report(f"{cell.name}: {json.dumps(results['cells'][cell.name])}")
            write_json(file, results)
            file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    print(render_table(results))
    return 0


def _grid(options: argparse.Namespace) -> list[Cell]:
    axes = itertools.product(options.bases, options.dtypes, BATCHES, CAPTIONS, (False, True), (None, *options.quantize))
    return [
        Cell(base, dtype, batch, captions, checkpointing, quantization=quantization)
        for base, dtype, batch, captions, checkpointing, quantization in axes
    ]


def measure(cell: Cell, root: Path, device: str) -> Record:
    """Estimated and measured bytes of one step."""
    import torch

    from qwen_vl_lora.training.memory import MemoryModel, PassShape
    from qwen_vl_lora.training.rows import fullest_pass

    parts = prepare(cell, root, device)
    loop, settings = parts["loop"], parts["settings"]
    rows = fullest_pass(parts["train"][: settings.training_args.captions_per_step], settings.rows, cell.batch)
    step = [parts["collator"](rows)]
    estimate = MemoryModel.of(parts["base_model"].geometry, settings, mask_bytes=COUNTED_MASK_BYTES[device])
    shape = PassShape.of_rows(rows)
    take_step(loop, step)  # makes AdamW's moments
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        take_step(loop, step)
        measured, estimated = torch.cuda.max_memory_allocated(), estimate.peak(shape)
    else:
        measured = _allocated_by(lambda: take_step(loop, step))
        estimated = estimate.step(shape) - 12 * estimate.lora_parameters
    del parts
    gc.collect()
    mib = {"measured_mib": round(measured / 2**20, 1), "estimated_mib": round(estimated / 2**20, 1)}
    return {**mib, "tokens": shape.tokens, "ratio": round(estimated / measured, 3)}


def take_step(loop: Any, step: list[Any]) -> None:
    """One optimizer step, as the loop takes it."""
    loop.compute_gradients(step, sum(len(forward.labels) for forward in step))
    loop.optimizer.step()
    loop.model.zero_grad(set_to_none=True)


def _allocated_by(action: Any) -> int:
    """Largest sum of allocations less releases that torch's CPU allocator counted."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        action()
    now = most = 0
    for event in watched.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def prepare(cell: Cell, root: Path, device: str) -> dict[str, Any]:
    """Base, pictures, stored features, encoded conversations and a loop that is about to begin."""
    import torch

    from benchmarks import project, replica
    from qwen_vl_lora.features.inputs import choose_pictures
    from qwen_vl_lora.model.base_model import BaseModel
    from qwen_vl_lora.model.chat import ChatEncoder
    from qwen_vl_lora.samples.conversations import Conversations
    from qwen_vl_lora.training import train as training
    from qwen_vl_lora.training.collator import RowCollator
    from qwen_vl_lora.training.loop import TrainingLoop

    base = root / "bases" / f"{cell.base}-{cell.dtype}"
    if not base.is_dir():
        replica.build_base(base, replica.GEOMETRIES[cell.base], dtype=cell.dtype, device=device)
    folder = Path(tempfile.mkdtemp(dir=root))
    job, settings = _job(cell, folder, base, device)
    replica.prepare_training(job)
    images = project.open_images(folder, "train")
    store = project.encode(job, images, project.open_workspace(job))
    base_model = BaseModel(name=cell.base, path=base)
    encoder = ChatEncoder(base_model.load_processor(), settings.image, images)
    train = [encoder.encode(conversation) for conversation in Conversations(job.conversations("train"))]
    pictures = choose_pictures("frozen", base_model, encoder, store, cell.dtype)
    model = training._load_trainable(base_model, None, settings, torch.device(device))
    collator = RowCollator(encoder, pictures)
    loop = TrainingLoop(model, train, [], collator, settings, cell.batch, folder / "checkpoints")
    loop.prepare()
    return {
        "base_model": base_model,
        "train": sorted(train, key=lambda conversation: len(conversation.ids), reverse=True),
        "loop": loop,
        "collator": collator,
        "settings": settings,
    }


def _job(cell: Cell, folder: Path, base: Path, device: str) -> tuple[Job, Any]:
    from benchmarks import replica
    from qwen_vl_lora.model.base_model import BaseModel

    workload = Workload(
        "memory",
        "train",
        images=cell.batch,
        captions=cell.captions,
        side=cell.side,
        checkpointing=cell.checkpointing,
        batch_size=cell.batch,
        dtype=cell.dtype,
        device=device,
    )
    targets = list(BaseModel(name=cell.base, path=base).geometry.projections)
    lora = {**workload.parameters["lora"], "lora_dropout": cell.dropout, "target_modules": targets}
    changes = {**workload.parameters, "lora": lora, "quantization": cell.quantization}
    options = {"parameters": changes, "images": cell.batch, "captions": cell.captions, "side": cell.side}
    parameters = replica.write_parameters(folder, changes)
    return Job("benchmarks.memory", "measure", folder, folder / "scratch", base, options=options), parameters


def render_table(results: Record) -> str:
    """The results as Markdown."""
    worst = max(abs(cell["ratio"] - 1) for cell in results["cells"].values())
    lines = [
        f"{results['machine']}; commit {results['commit']}; torch {results['versions']['torch']}, transformers "
        f"{results['versions']['transformers']}, peft {results['versions']['peft']}.",
        "",
        f"Largest error of the estimate: {worst:.0%}. On a CPU: what a step adds to weights, adapter and moments.",
        "",
        "| cell | tokens | measured MiB | estimated MiB | estimated / measured |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {cell['tokens']} | {cell['measured_mib']} | {cell['estimated_mib']} | {cell['ratio']:.2f} |"
        for name, cell in results["cells"].items()
    ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    names = {"type": lambda text: [name for name in text.split(",") if name]}
    parser.add_argument("--bases", default=["replica"], **names, help="toy, replica; on a GPU 2b, 7b")
    parser.add_argument("--dtypes", default=["float32"], **names, help="float32, bfloat16")
    parser.add_argument("--quantize", default=[], **names, help="nf4, int8 beside the unquantized base")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
