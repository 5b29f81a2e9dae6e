"""`make bench`: the tutorials' method and this project, side by side.

    python -m benchmarks.bench [--only W0,W1,…] [--long] [--repeats N] [--minutes N] [--fresh]
                               [--quick] [--threads N] [--out FOLDER]

Results are rewritten after every pair of runs, so a killed bench keeps what it has: started again on the
same day, machine and commit it goes on where it stopped. `--only` adds to the same file.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import history
from benchmarks.jobs import read_json, write_json
from benchmarks.machine import CHANGES, current_commit, describe_machine, slug, versions
from benchmarks.measuring import PROJECT, RESULTS, Bench, Record, report
from benchmarks.workloads import D_GROWTH_MB, Workload, choose

QUIET_LOAD = 0.5

COLUMNS = (
    "workload",
    "runs",
    "baseline s",
    "project s",
    "ratio",
    "lower quartile",
    "in CPU time",
    "target",
    "noise",
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
    chosen = choose(options.only)
    if options.only is None and not options.long:
        chosen = [workload for workload in chosen if workload.repeats]
    workloads = [workload.toy() if options.quick else workload for workload in chosen]
    if os.getloadavg()[0] > QUIET_LOAD:
        report(f"The machine is busy (load {os.getloadavg()[0]:.1f}): these timings will not be worth much.")
    file = options.out / f"{results_name(describe_machine())}{'-quick' if options.quick else ''}.json"
    if options.fresh:
        file.unlink(missing_ok=True)
    times = {work.key: options.repeats or work.times(is_long=options.long) or 1 for work in workloads}
    results = run(workloads, file, times, options.threads, options.minutes)
    print(render_table(results))
    if options.out == RESULTS and not options.quick:
        history.write(RESULTS)
    return 1 if any(entry["checks"]["failures"] for entry in results["workloads"].values()) else 0


def run(
    workloads: Sequence[Workload], file: Path, times: Mapping[str, int], threads: int, minutes: float | None = None
) -> Record:
    """Measure, and write `file` and the table beside it after each pair of runs.

    Args:
        times: pairs of runs of each workload.
        minutes: a workload that is not expected to end within them is left out.
    """
    machine, commit = describe_machine(), current_commit(PROJECT)
    results: Record = {"commit": commit, "machine": machine, "threads": threads, "versions": versions()}
    results["workloads"] = read_json(file)["workloads"] if file.is_file() else {}
    known = {workload.key: _known(results["workloads"].get(workload.key), commit) for workload in workloads}
    seconds = {work.key: _expected_seconds(work, times[work.key], known[work.key]) for work in workloads}
    report(f"{len(workloads)} workloads, about {sum(seconds.values()) / 60:.0f} minutes on 2 quiet cores; to {file}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-bench-") as root:
        bench = Bench(Path(root), threads)
        for workload in workloads:
            left = None if minutes is None else 60 * minutes - (time.monotonic() - started)
            if left is not None and seconds[workload.key] > left:
                report(f"{workload.key} is left out: it takes about {seconds[workload.key] / 60:.1f} minutes.")
                continue
            for measured in bench.measure(workload, times[workload.key], known[workload.key]):
                load = round(os.getloadavg()[0], 2)
                results["workloads"][workload.key] = {**measured, "commit": commit, "load_after": load}
                add_growth(results["workloads"])
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, results)
                file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    return results


def _known(entry: Record | None, commit: str) -> Record | None:
    """What an earlier, killed bench measured of a workload, if it was the same code."""
    is_same = entry is not None and entry["commit"] == commit and not commit.endswith(CHANGES)
    return entry if is_same else None


def _expected_seconds(workload: Workload, times: int, known: Record | None) -> float:
    done = len(known["runs"]["baseline"]) if known else 0
    return workload.seconds * max(0, times - done)


def add_growth(workloads: dict[str, Any]) -> None:
    """The project's extra memory for ten times the images, once both sizes were measured."""
    if not {"D_2000", "D_20000"} <= set(workloads):
        return
    small, large = (workloads[key]["project_peak_mb"] for key in ("D_2000", "D_20000"))
    entry = workloads["D_20000"]
    entry["growth_mb"] = round(large - small, 1)
    ratio_reached = entry["judged"] >= entry["target"]["ratio"] and not entry["checks"]["failures"]
    entry["reached"] = ratio_reached and entry["growth_mb"] <= D_GROWTH_MB


def render_table(results: Record) -> str:
    """The results as Markdown."""
    lines = [
        f"{results['machine']}; commit {results['commit']}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}, {results['threads']} threads. Medians; noise is a side's "
        "longest run over its shortest, in wall time and in CPU time.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|" + "---:|" * 12 + "---|---|",
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
        str(len(entry["runs"]["project"])),
        f"{entry['baseline_s']:.1f}",
        f"{entry['project_s']:.1f}",
        f"{entry['ratio']:.2f}×",
        _or_dash(entry.get("lower_quartile"), "{:.2f}×"),
        _or_dash(entry.get("cpu_ratio"), "{:.2f}×"),
        "–" if wanted is None else f"{'≤' if slower else '≥'} {wanted}×",
        _or_dash(entry.get("noise"), "{0[wall]:.2f}, {0[cpu]:.2f}"),
        f"{entry['baseline_peak_mb']:.0f}",
        f"{entry['project_peak_mb']:.0f}",
        f"{entry['peak_share']:.0%}",
        "–" if share is None else f"≤ {share:.0%}",
        "no" if entry["checks"]["failures"] else "yes",
        "yes" if entry["reached"] else "**no**",
    ]
    return f"| {' | '.join(cells)} |"


def _or_dash(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="workloads, comma-separated; W1 is all of W1's")
    parser.add_argument("--long", action="store_true", help="all workloads, W1 in five pairs: about 2.5 hours")
    parser.add_argument("--repeats", type=int, help="runs of each side; default: the workload's own number")
    parser.add_argument("--minutes", type=float, help="leave out what is not expected to end within them")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured today")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on both sides")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that everything runs, measures nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


def results_name(machine: str) -> str:
    """Name of the results file, without its suffix."""
    return f"{datetime.date.today().isoformat()}-{slug(machine)}"


if __name__ == "__main__":
    sys.exit(main())
