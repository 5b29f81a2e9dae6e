"""`benchmarks/results/history.md`: the ratio of each workload over dates and commits, so that a loss of speed is seen.

    python -m benchmarks.history

Made from the results of `make bench` that lie beside it. A ratio is held against those of the same machine alone.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.jobs import read_json
from benchmarks.measuring import RESULTS, Record

LOSS = 0.9
"""A ratio below this share of the one before on the same machine is marked."""


def write(results: Path) -> Path:
    """Write the table from the results in a folder."""
    file = results / "history.md"
    file.write_text(render(sorted(results.glob("*.json"))), encoding="utf-8")
    return file


def render(files: list[Path]) -> str:
    """The table, from results in the order of their dates, which their names begin with."""
    measured = [(file.name[:10], found) for file in files if _is_of_bench(found := read_json(file))]
    keys = sorted({key for _, results in measured for key in results["workloads"]})
    before: dict[tuple[str, str], float] = {}
    lines = [
        "Seconds of the tutorials' method over seconds of this project (S: the other way round), medians of one run of",
        f"`make bench`. Bold: less than {LOSS:.0%} of the ratio before on the same machine.",
        "",
        f"| date | commit | machine | {' | '.join(keys)} |",
        "|---|---|---|" + "---:|" * len(keys),
    ]
    for date, results in measured:
        cells = [date, results["commit"], results["machine"]]
        cells += [_cell(key, results, before) for key in keys]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _is_of_bench(results: Record) -> bool:
    workloads = results.get("workloads")
    return isinstance(workloads, dict) and all("baseline_s" in entry for entry in workloads.values())


def _cell(key: str, results: Record, before: dict[tuple[str, str], float]) -> str:
    """A workload's ratio; `before` has the last one by machine and workload, and gets this one."""
    entry = results["workloads"].get(key)
    if entry is None:
        return "–"
    ratio, place = entry["ratio"], (results["machine"], key)
    last = before.get(place, ratio)
    before[place] = ratio
    is_loss = ratio > last / LOSS if entry["ratio_of"] == "project/baseline" else ratio < LOSS * last
    return f"**{ratio:.2f}**" if is_loss else f"{ratio:.2f}"


if __name__ == "__main__":
    print(write(RESULTS))
