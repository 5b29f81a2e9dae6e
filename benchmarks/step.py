"""Time of an optimizer step with the last layer shortened, beside the same step with the whole layer, in turn.

    python -m benchmarks.step [--pairs 15] [--out FOLDER]

One process holds both: the same model, the same captions. The replica's geometry, random weights, dropout 0.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import write_json
from benchmarks.machine import current_commit, describe_machine, versions
from benchmarks.measuring import PROJECT, Record
from benchmarks.memory import Cell, prepare, take_step

CELLS = tuple(Cell("replica", "float32", 4, captions, checks) for captions in (1, 5) for checks in (False, True))


class WholeLayer:
    """In the place of a `LastLayer`: every position is computed."""

    def scored_logits(self, model: Any, inputs: dict[str, Any], source: Any) -> Any:
        return model(**inputs, use_cache=False).logits[tuple(source)]


def measure(cell: Cell, root: Path, pairs: int) -> Record:
    """CPU seconds of both kinds of step, medians, and the quartiles of their ratios pair by pair."""
    import torch

    from qwen_vl_lora.training.rows import plan_passes

    torch.set_num_threads(2)
    parts = prepare(cell, root, "cpu")
    loop, settings = parts["loop"], parts["settings"]
    captions = parts["train"][: settings.training_args.captions_per_step]
    passes = [parts["collator"](rows) for rows in plan_passes(captions, settings.rows, cell.batch)]
    kinds = {"whole": WholeLayer(), "short": loop._last_layer}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(pairs + 1):
        for name, layer in kinds.items():
            loop._last_layer = layer
            began = time.process_time()
            take_step(loop, passes)
            if turn:  # the first ones are warm-up
                seconds[name].append(time.process_time() - began)
    ratios = statistics.quantiles([whole / short for whole, short in zip(*seconds.values(), strict=True)])
    medians = {f"{name}_cpu_s": round(statistics.median(values), 3) for name, values in seconds.items()}
    return {**medians, "ratio_quartiles": [round(ratio, 3) for ratio in ratios]}


def main() -> int:
    """Measure the cells and write them down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    machine = describe_machine()
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "versions": versions(), "cells": {}}
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-step-") as root:
        for cell in CELLS:
            results["cells"][cell.name] = measure(cell, Path(root), options.pairs)
            print(cell.name, results["cells"][cell.name], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{results_name(machine)}-step.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
