"""`make bench-scale`: data_engineering of long tables, each in a fresh `kedro run`: peak memory and time per row.

    python -m benchmarks.scale [--rows 100000,500000,1000000] [--pictures 2000] [--params KEY=VALUE,…] [--out FOLDER]
        [--train-rows 1000000]

One table is then trained on for one step, twice: the second time its conversations are tokenised already.

The rows name few pictures, so that the cost of a row is measured and not that of a picture, which `make bench` has (D).
Imports nothing heavy, see `jobs`.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job, read_json, write_json
from benchmarks.machine import current_commit, describe_machine, slug
from benchmarks.measuring import PROJECT, Record, report, run_job

RESULTS = PROJECT / "benchmarks" / "results"
ROWS = (100_000, 500_000, 1_000_000)
PICTURES = 2_000
IN_TURN = 5
"""Captions of one picture that follow each other, as in COCO's table."""

MAX_PEAK_MB, MAX_SECONDS, MAX_GROWTH = 1_500, 360, 1.1
"""Targets at 1,000,000 rows, and of seconds per row beyond 500,000 to those between 100,000 and 500,000."""

MAX_SECONDS_TO_STEP = 30
"""Target from the start of a second training to its first optimizer step; its peak before the model is MAX_PEAK_MB."""

_BEFORE_MODEL, _FIRST_STEP = "All pictures are asked", "Step 1 of 1"
"""What a training says when its data are read, and after its first step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each size and print the table."""
    options = _parse(arguments)
    sizes = [int(size) for size in options.rows.split(",")]
    machine = describe_machine()
    file = options.out / f"{datetime.date.today().isoformat()}-{slug(machine)}-scale.json"
    known = read_json(file)["runs"] if file.is_file() else []
    report(f"To {file}")
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-scale-", dir=options.scratch) as root:
        folder = Path(root) / "source"
        folder.mkdir()
        prepared = {"images": options.pictures, "parameters": {}}
        run_job(Job("benchmarks.replica", "prepare_source", folder, folder / "prepared", torch=False, options=prepared))
        for rows in sizes:
            table = {"rows": rows, "images": options.pictures}
            run_job(Job("benchmarks.scale", "write_table", folder, folder / "prepared", torch=False, options=table))
            run = measure(Path(root) / "project", folder / f"{rows}.csv", options.params)
            run = {"rows": rows, "pictures": options.pictures, "params": options.params, **run}
            if rows == options.train_rows:
                run["training"] = [train(Path(root) / "project", folder / f"{rows}.csv") for _ in range(2)]
            run |= {"commit": current_commit(PROJECT), "load_after": round(os.getloadavg()[0], 2)}
            known = [one for one in known if (one["rows"], one["params"]) != (rows, options.params)] + [run]
            known.sort(key=lambda one: (one["params"], one["rows"]))
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(file, {"machine": machine, "runs": known})
            file.with_suffix(".md").write_text(render_table(machine, known), encoding="utf-8")
    print(render_table(machine, known))
    return 0


def write_table(job: Job) -> Record:
    """Write a CSV of `rows` different captions of the pictures that `prepare_source` wrote."""
    import csv

    with (job.data / "captions.csv").open(encoding="utf-8", newline="") as lines:
        pictures = list(csv.DictReader(lines))
    with (job.data / f"{job.options['rows']}.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("image_id", "image_path", "caption"))
        for number in range(job.options["rows"]):
            picture = pictures[number // IN_TURN % len(pictures)]
            caption = f"{picture['caption']}, as seen by the reader number {number}"
            writer.writerow((picture["image_id"], picture["image_path"], caption))
    return {}


def measure(project: Path, table: Path, params: str) -> Record:
    """Run data_engineering on a table in an empty project; seconds of the clock and the processor, and peak memory.

    Raises:
        RuntimeError: when the run fails, with the end of its output.
    """
    shutil.rmtree(project, ignore_errors=True)
    project.mkdir()
    shutil.copytree(PROJECT / "conf", project / "conf")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, project)
    (project / "src").mkdir()
    run = _kedro_run(project, "data_engineering", f"captions_file={table}", *([params] if params else []))
    return {**run, "files": {path.stem: _describe(path) for path in _artifacts(project)}}


def train(project: Path, table: Path) -> Record:
    """Train one step on a collected table with the small base; as `measure`, with the time until the step.

    Raises:
        RuntimeError: when the run fails, with the end of its output.
    """
    base = Path("data", "06_models", "tiny_qwen2_vl")
    if not (project / base).exists():
        shutil.copytree(PROJECT / base, project / base)
    seen: Record = {}
    once = ("training_args.max_steps=1", "training_args.warmup_steps=0", "trackers=[]", "device=cpu")

    def note(line: str, pid: int, seconds: float) -> None:
        if _BEFORE_MODEL in line:
            seen["peak_mb_before_model"] = _peak_mb(pid)
        elif _FIRST_STEP in line:
            seen["seconds_to_step"] = round(seconds, 1)

    return {**_kedro_run(project, "training", f"captions_file={table}", *once, note=note), **seen}


def _kedro_run(
    project: Path, pipeline: str, *params: str, note: Callable[[str, int, float], None] | None = None
) -> Record:
    """Run a pipeline; `note` gets each line of its output, with the process and the seconds since its start."""
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", pipeline]
    command += ["--env", "own_captions", "--params", ",".join(params)]
    variables = {
        "PYTHONPATH": str(PROJECT / "src"),
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    lines = []
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line)
            if note is not None:
                note(line, child.pid, time.perf_counter() - started)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"kedro run failed with exit code {child.returncode}:\n{''.join(lines)}")
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def _peak_mb(pid: int) -> int:
    """The most memory that a process has had so far."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _artifacts(project: Path) -> list[Path]:
    """Files of the tables that data_engineering wrote."""
    found = sorted((project / "data").glob("0[235]_*/*/*/*/*.*"))
    return [path for path in found if path.is_file() and path.suffix in (".csv", ".json")]


def _describe(path: Path) -> Record:
    """Size and hash, so that two commits can be compared."""
    with path.open("rb") as opened:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()[:16]}


def render_table(machine: str, runs: Sequence[Record]) -> str:
    """The runs as Markdown, with the targets and how much the time of a row grows."""
    lines = [
        f"{machine}. Targets at 1,000,000 rows: {MAX_PEAK_MB} MB, {MAX_SECONDS} s.",
        "",
        "| rows | parameters | seconds | CPU seconds | CPU µs a row | peak MB | MB of samples | load after | commit |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for run in runs:
        cells: list[Any] = [f"{run['rows']:,}", run["params"] or "–", run["seconds"], run["cpu_s"]]
        cells += [f"{1e6 * run['cpu_s'] / run['rows']:.0f}", run["peak_mb"]]
        cells += [f"{run['files']['samples']['bytes'] / 1e6:.0f}", run["load_after"], run["commit"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for params in dict.fromkeys(run["params"] for run in runs):
        by_rows = {run["rows"]: run for run in runs if run["params"] == params}
        if set(ROWS) <= set(by_rows):
            first, second = (
                (by_rows[more]["cpu_s"] - by_rows[less]["cpu_s"]) / (more - less) for less, more in pairwise(ROWS)
            )
            grown = f"From {ROWS[1]:,} to {ROWS[2]:,} rows a row takes {second / first:.2f} of the CPU time before"
            lines += ["", f"{grown} (at most {MAX_GROWTH})."]
    for run in runs:
        for which, trained in zip(("first", "second"), run.get("training", ()), strict=False):
            lines += [
                "",
                f"Training on {run['rows']:,} rows, {which} time: {trained['seconds_to_step']} s to the first step, "
                f"{trained['peak_mb_before_model']} MB before the model, {trained['cpu_s']} CPU seconds in all"
                f"{f' (at most {MAX_SECONDS_TO_STEP} s and {MAX_PEAK_MB} MB)' if which == 'second' else ''}.",
            ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="sizes of the tables, comma-separated")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="different pictures that the rows name")
    parser.add_argument("--params", default="", help="parameters of the run, as for kedro run")
    parser.add_argument("--train-rows", type=int, default=ROWS[-1], help="size of the table to train on; 0 trains none")
    parser.add_argument("--scratch", type=Path, help="folder of temporary data; about 4 GB for 1,000,000 rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
