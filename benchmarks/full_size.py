"""A recipe at its true architecture with random weights: built, overfitted, and run as a whole.

    python -m benchmarks.full_size --env qwen2_vl_2b_coco --geometry 2b        # on a GPU
    python -m benchmarks.full_size --env qwen2_5_vl_7b --geometry 7b
    python -m benchmarks.full_size --env qwen2_vl_2b_coco --geometry toy --device cpu --dtype float32 --rows 24

Memory, speed and correctness need no real weights:

1. a checkpoint of the geometry is built (2b: 4.4 GB, 7b: 16.6 GB on disk), with Qwen's own vocabulary (see
   `vocabulary`): tokens of texts and pictures are the real ones;
2. 16 samples are overfitted; the loss must at least halve, or the command ends with status 1;
3. `kedro run --env …` goes from pictures to report, with the recipe's own settings, on drawn pictures in the place of
   the recipe's source; peak memory stands beside what `qwen-vl-lora plan` said before.

Results go to `results/<date>-<machine>-<geometry>.json`. Captions of random weights mean nothing; nobody looks at them.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import Job, read_json, write_json
from benchmarks.machine import current_commit, describe_gpu, describe_machine, versions
from benchmarks.measuring import PROJECT, Record, report
from benchmarks.workloads import Workload

OVERFITTING = Workload("overfit", "train", images=16, epochs=40, learning_rate=1e-3, checkpointing=True)
ONE_PASS_STEPS = {
    "training_args": {"gradient_accumulation_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant"}
}
SOURCE_SIDE = 336
"""Pixels of the drawn pictures: larger than both recipes' picture size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the three parts; gives 1 when the loss did not halve."""
    options = _parse(arguments)
    machine = f"{describe_gpu()}; {describe_machine()}" if options.device == "cuda" else describe_machine()
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "versions": versions()}
    results |= {"env": options.env, "geometry": options.geometry, "dtype": options.dtype}
    file = options.out / f"{results_name(machine)}-{options.geometry}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-full-", dir=options.work) as root:
        base = Path(root) / "base"
        parts = {
            "build": lambda: build(base, options),
            "overfit": lambda: overfit(base, Path(root) / "overfit", options),
            "recipe": lambda: run_recipe(base, Path(root) / "recipe", options),
        }
        for name, part in parts.items():
            started = time.perf_counter()
            results[name] = part()
            results[name]["wall_s"] = round(time.perf_counter() - started, 1)
            report(f"{name}: {json.dumps(results[name])}")
            write_json(file, results)
    return 0 if results["overfit"]["halved"] else 1


def build(base: Path, options: argparse.Namespace) -> Record:
    """Write the checkpoint."""
    from benchmarks import replica
    from qwen_vl_lora.model.base_model import BaseModel

    replica.build_base(base, replica.GEOMETRIES[options.geometry], options.dtype, options.device)
    model = BaseModel(name=options.geometry, path=base)
    size = sum(path.stat().st_size for path in model.weight_files)
    return {"parameters": model.geometry.parameters, "bytes": size}


def overfit(base: Path, folder: Path, options: argparse.Namespace) -> Record:
    """Train on 16 samples only, by the project's own nodes."""
    from benchmarks import project, replica

    side = _recipe(options.env)["image"]["resized_height"] if options.device == "cuda" else 56
    workload = replace(OVERFITTING, side=side, dtype=options.dtype, device=options.device)
    shape = {"images": workload.images, "captions": 1, "side": side}
    folder.mkdir()
    given = {"parameters": workload.parameters, "changes": ONE_PASS_STEPS, **shape}
    job = Job("benchmarks.project", "train", folder, folder, base, options=given)
    replica.prepare_training(job)
    return halved(project.train(job)["summary"])


def halved(summary: Record) -> Record:
    """What counts of an overfitting, and whether its loss halved."""
    kept = ("steps", "seconds", "samples_per_second", "peak_memory_mb", "first_loss", "last_loss", "device", "dtype")
    return {**{name: summary[name] for name in kept}, "halved": summary["last_loss"] <= summary["first_loss"] / 2}


def run_recipe(base: Path, folder: Path, options: argparse.Namespace) -> Record:
    """`kedro run` of the recipe in a project of its own, as a person starts it, and the plan before it."""
    _make_project(folder, options)
    params = {"base_model": base.absolute(), "device": options.device, "captions_file": "source/captions.csv"}
    if options.dtype == "float32":
        params["training_args.bf16"] = "false"
    given = ["--env", options.env, "--params", ",".join(f"{name}={value}" for name, value in params.items())]
    planned = json.loads(_call([sys.executable, "-m", "qwen_vl_lora", "plan", "--json", *given], folder))
    _call([sys.executable, "-m", "kedro", "run", *given], folder)
    summary = _newest(folder, options.env, "08_reporting", "training_summary.json")
    configured = next(need for need in planned["memory"] if need["is_configured"])
    return {
        "training": summary,
        "planned": {"steps": planned["steps"], "allocated_mb": round(configured["allocated"] / 2**20, 1)},
        "metrics": _newest(folder, options.env, "08_reporting", "caption_metrics.json")["tuned"],
        "as_planned": summary["steps"] == planned["steps"],
    }


def _make_project(folder: Path, options: argparse.Namespace) -> None:
    """The project's configuration, and drawn pictures in the place of the recipe's source."""
    from benchmarks.replica import draw_samples
    from qwen_vl_lora.tiny.partitions import Partition

    copy_configuration(folder)
    source = {
        "type": "qwen_vl_lora.datasets.sources.CaptionsFileDataset",
        "filepath": "${runtime_params:captions_file}",
    }
    catalog = folder / "conf" / options.env / "catalog.yml"
    catalog.write_text(yaml.safe_dump({"captioned_images": source}), encoding="utf-8")
    pictures = folder / "source"
    pictures.mkdir()
    rows = options.rows or _recipe(options.env)["captions"]["num_rows"] or 500
    with (pictures / "captions.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("image_path", "caption"))
        for sample in draw_samples(Partition.FINE_TUNING, rows, 1, SOURCE_SIDE):
            name = f"{sample.id}.jpg"
            (pictures / name).write_bytes(bytes(sample.images[0]))
            writer.writerow((name, sample.turns[-1].text))


def copy_configuration(folder: Path) -> None:
    """A project without data: the configuration alone, because the package is installed."""
    shutil.copytree(PROJECT / "conf", folder / "conf")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, folder)
    (folder / "src").mkdir()


def _recipe(env: str) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((PROJECT / "conf" / env / "parameters.yml").read_text(encoding="utf-8"))
    return recipe


def _newest(folder: Path, env: str, layer: str, name: str) -> Any:
    versions_folder = folder / "data" / layer / env / name
    return read_json(sorted(versions_folder.iterdir())[-1] / name)


def _call(command: list[str], folder: Path) -> str:
    """Standard output of a command in `folder`; its end is shown when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__.partition("\n")[0])
    parser.add_argument("--env", default="qwen2_vl_2b_coco", help="the recipe that is run")
    parser.add_argument("--geometry", default="2b", choices=["toy", "replica", "2b", "7b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--rows", type=int, help="captions of the recipe's run; default: the recipe's own number, or 500"
    )
    parser.add_argument("--work", type=Path, help="where checkpoint and project lie meanwhile; default: the system's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
