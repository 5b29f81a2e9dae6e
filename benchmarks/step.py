"""CPU time of an optimizer step and of the vision tower, beside the same work as transformers does it, in turn.

    python -m benchmarks.step [--pairs 15] [--out FOLDER]

Each pair is followed by a profile: milliseconds of the operators that take longest, theirs and ours.

Steps: the last layer at scored positions beside the whole layer. Tower: `quicken` beside the plain one, eight pictures
of 280×280. One process holds both ways: the same weights, the same captions. The replica's geometry, dropout 0.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import write_json
from benchmarks.machine import current_commit, describe_machine, versions
from benchmarks.measuring import PROJECT, Record
from benchmarks.memory import Cell, prepare, take_step

CELLS = tuple(Cell("replica", "float32", 4, captions, checks) for captions in (1, 5) for checks in (False, True))


MOST_OPERATORS = 10
"""Operators that a profile names, of either way."""


class WholeLayer:
    """In the place of a `LastLayer`: every position is computed."""

    def scored_logits(self, model: Any, inputs: dict[str, Any], source: Any) -> Any:
        return model(**inputs, use_cache=False).logits[tuple(source)]


def measure_step(cell: Cell, root: Path, pairs: int) -> Record:
    """An optimizer step of the loop."""
    from qwen_vl_lora.training.rows import plan_passes

    parts = prepare(cell, root, "cpu")
    loop, settings = parts["loop"], parts["settings"]
    captions = parts["train"][: settings.training_args.captions_per_step]
    passes = [parts["collator"](rows) for rows in plan_passes(captions, settings.rows, cell.batch)]

    def step(layer: Any) -> None:
        loop._last_layer = layer
        take_step(loop, passes)

    own = loop._last_layer
    return in_turn(lambda: step(WholeLayer()), lambda: step(own), pairs)


def measure_tower(base: Path, pairs: int) -> Record:
    """The vision tower over eight pictures of 280×280."""
    import torch

    from qwen_vl_lora.features.fast_tower import quicken
    from qwen_vl_lora.model.base_model import BaseModel

    plain, quick = (BaseModel("replica", base).load_vision_tower("float32", "cpu") for _ in range(2))
    quicken(quick)
    grid = torch.tensor([[1, 20, 20]] * 8)
    pixels = torch.randn(int(grid.prod(-1).sum()), plain.patch_embed.proj.weight[0].numel())
    with torch.inference_mode():
        return in_turn(lambda: plain(pixels, grid_thw=grid), lambda: quick(pixels, grid_thw=grid), pairs)


def in_turn(theirs: Callable[[], object], ours: Callable[[], object], pairs: int) -> Record:
    """Median CPU seconds of both, and the quartiles of their ratios pair by pair."""
    seconds: dict[str, list[float]] = {"transformers": [], "project": []}
    for turn in range(pairs + 1):
        for name, work in zip(seconds, (theirs, ours), strict=True):
            began = time.process_time()
            work()
            if turn:  # the first ones are warm-up
                seconds[name].append(time.process_time() - began)
    ratios = statistics.quantiles([plain / quick for plain, quick in zip(*seconds.values(), strict=True)])
    medians = {f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in seconds.items()}
    profiles = dict(zip(seconds, (operators(theirs), operators(ours)), strict=True))
    return {**medians, "ratio_quartiles": [round(ratio, 3) for ratio in ratios], "operators_ms": profiles}


def operators(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of CPU time of each operator itself, over one call; the longest ones, the others together."""
    from torch import profiler

    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
        work()
    times = {event.key: event.self_cpu_time_total / 1000 for event in profile.key_averages()}
    longest = sorted(times, key=lambda name: times[name], reverse=True)[:MOST_OPERATORS]
    rest = sum(times.values()) - sum(times[name] for name in longest)
    return {**{name: round(times[name], 1) for name in longest}, "others": round(rest, 1)}


def render_operators(cells: Record) -> str:
    """The profiles as Markdown, one table for each cell."""
    lines: list[str] = []
    for cell, measured in cells.items():
        theirs, ours = measured["operators_ms"].values()
        lines += [f"## {cell}", "", "| operator | transformers ms | project ms |", "|---|---:|---:|"]
        names = [name for name in dict.fromkeys([*theirs, *ours]) if name != "others"]
        lines += [f"| {name} | {theirs.get(name, '–')} | {ours.get(name, '–')} |" for name in [*names, "others"]]
        sums = " | ".join(f"{sum(side.values()):.1f}" for side in (theirs, ours))
        lines += [f"| all | {sums} |", ""]
    return "\n".join(lines)


def main() -> int:
    """Measure the cells and write them down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(2)
    machine = describe_machine()
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "versions": versions(), "cells": {}}
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-step-") as root:
        for cell in CELLS:
            results["cells"][cell.name] = measure_step(cell, Path(root), options.pairs)
            print(cell.name, results["cells"][cell.name], flush=True)
        base = Path(root) / "bases" / f"{CELLS[0].base}-{CELLS[0].dtype}"
        results["cells"]["tower"] = measure_tower(base, options.pairs)
    profiles = render_operators(results["cells"])
    print(profiles)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{results_name(machine)}-step.json"
    write_json(file, results)
    file.with_suffix(".md").write_text(profiles, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
