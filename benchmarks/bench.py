"""`make bench`: the tutorials' method and this project, side by side.

    python -m benchmarks.bench [--only W0,W1,…] [--repeats N] [--quick] [--threads N] [--out FOLDER]

Results are rewritten after every workload, so a killed run keeps what it has, and a run with
`--only` adds to the file of the same day and machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import read_json, write_json
from benchmarks.machine import current_commit, describe_machine, slug, versions
from benchmarks.measuring import PROJECT, Bench, Record, report
from benchmarks.workloads import D_GROWTH_MB, Workload, choose

RESULTS = PROJECT / "benchmarks" / "results"
QUIET_LOAD = 0.5

COLUMNS = (
    "workload",
    "baseline s",
    "project s",
    "ratio",
    "target",
    "baseline MB",
    "project MB",
    "share",
    "target",
    "same work",
    "reached",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen workloads; gives 1 when a check failed, whatever the figures."""
    options = _parse(arguments)
    workloads = [workload.toy() if options.quick else workload for workload in choose(options.only)]
    if os.getloadavg()[0] > QUIET_LOAD:
        report(f"The machine is busy (load {os.getloadavg()[0]:.1f}): these timings will not be worth much.")
    file = options.out / f"{results_name(describe_machine())}{'-quick' if options.quick else ''}.json"
    results = run(workloads, file, options.repeats, options.threads)
    table = render_table(results)
    print(table)
    return 1 if any(entry["checks"]["failures"] for entry in results["workloads"].values()) else 0


def run(workloads: Sequence[Workload], file: Path, repeats: int | None, threads: int) -> Record:
    """Measure, and write `file` and the table beside it after each workload."""
    machine, commit = describe_machine(), current_commit(PROJECT)
    results: Record = {"commit": commit, "machine": machine, "threads": threads, "versions": versions()}
    results["workloads"] = read_json(file)["workloads"] if file.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-bench-") as root:
        bench = Bench(Path(root), threads)
        for workload in workloads:
            measured = bench.measure(workload, repeats or workload.repeats)
            load = round(os.getloadavg()[0], 2)
            results["workloads"][workload.key] = {**measured, "commit": commit, "load_after": load}
            add_growth(results["workloads"])
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
            file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    return results


def add_growth(workloads: dict[str, Any]) -> None:
    """The project's extra memory for ten times the images, once both sizes were measured."""
    if not {"D_2000", "D_20000"} <= set(workloads):
        return
    small, large = (workloads[key]["project_peak_mb"] for key in ("D_2000", "D_20000"))
    entry = workloads["D_20000"]
    entry["growth_mb"] = round(large - small, 1)
    ratio_reached = entry["ratio"] >= entry["target"]["ratio"] and not entry["checks"]["failures"]
    entry["reached"] = ratio_reached and entry["growth_mb"] <= D_GROWTH_MB


def render_table(results: Record) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['machine']}; commit {results['commit']}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}, {results['threads']} threads. Medians.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * 8 + "---|---|",
        *(_table_row(key, entry) for key, entry in sorted(results["workloads"].items())),
        "",
    ]
    for key, entry in sorted(results["workloads"].items()):
        lines += [f"- {key}: {failure}" for failure in entry["checks"]["failures"]]
        if "growth_mb" in entry:
            lines.append(f"- {key}: {entry['growth_mb']:+.0f} MB against D_2000 (at most {D_GROWTH_MB})")
    return "\n".join(lines).rstrip() + "\n"


def _table_row(key: str, entry: Record) -> str:
    slower = entry["ratio_of"] == "project/baseline"
    wanted, share = entry["target"]["ratio"], entry["target"]["peak_share"]
    cells = [
        key,
        f"{entry['baseline_s']:.1f}",
        f"{entry['project_s']:.1f}",
        f"{entry['ratio']:.2f}×",
        "–" if wanted is None else f"{'≤' if slower else '≥'} {wanted}×",
        f"{entry['baseline_peak_mb']:.0f}",
        f"{entry['project_peak_mb']:.0f}",
        f"{entry['peak_share']:.0%}",
        "–" if share is None else f"≤ {share:.0%}",
        "no" if entry["checks"]["failures"] else "yes",
        "yes" if entry["reached"] else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="workloads, comma-separated; W1 is all of W1's")
    parser.add_argument("--repeats", type=int, help="runs of each side; default: the workload's own number")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on both sides")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that everything runs, measures nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def results_name(machine: str) -> str:
    """Name of the results file, without its suffix."""
    return f"{datetime.date.today().isoformat()}-{slug(machine)}"


if __name__ == "__main__":
    sys.exit(main())
