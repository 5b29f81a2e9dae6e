"""One workload, measured: both sides in turn, each run in a fresh process with cold caches.

Imports nothing heavy, see `jobs`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import startup
from benchmarks.jobs import Job, read_json
from benchmarks.workloads import Workload

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
SIDES = ("baseline", "project")
UNTRAINED_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Relative, of the untrained model's loss: both sides compute it over other shapes, so roundings differ."""

QUARTILE_FROM = 5
"""Pairs of runs from which their quartile says more than the ratio of the medians."""

Record = dict[str, Any]
MeasurePair = Callable[[int], tuple[dict[str, Record], Record]]
"""Measures both sides once, given how often they were; gives both runs and, where it looked, what it checked."""

_MODULES = {
    ("baseline", "train"): "benchmarks.tutorial",
    ("baseline", "caption"): "benchmarks.tutorial",
    ("baseline", "engineer"): "benchmarks.tutorial_data",
}


@dataclass(frozen=True)
class Bench:
    """What all workloads of one run of the bench share.

    Attributes:
        root: temporary folder; bases are built once in it.
        threads: of torch, on both sides.
    """

    root: Path
    threads: int

    def measure(self, workload: Workload, repeats: int, known: Record | None = None) -> Iterator[Record]:
        """Measure both sides in turn; gives medians, checks and every run so far after each pair of runs.

        Args:
            repeats: pairs of runs, with those of `known`.
            known: what was given last when the bench was stopped.

        Raises:
            RuntimeError: when a process fails, with the end of its output.
        """
        runs: dict[str, list[Record]] = known["runs"] if known else {side: [] for side in SIDES}
        checks: Record = known["checks"] if known else {}
        done = len(runs["project"])
        if done >= repeats:
            report(f"{workload.key}: measured before")
            return
        folder = self.root / workload.key
        folder.mkdir(parents=True)
        try:
            measure = self._startup(folder) if workload.kind == "startup" else self._pairs(workload, folder)
            for number in range(done, repeats):
                pair, found = measure(number)
                for side in SIDES:
                    runs[side].append(pair[side])
                checks = found or checks
                if workload.kind == "engineer":
                    checks = check_images(workload, runs)
                yield summarize(workload, runs, checks)
        finally:
            shutil.rmtree(folder)

    def prepare(self, workload: Workload, data: Path) -> Job:
        """Write the data of a workload; gives the job that both sides then get."""
        data.mkdir()
        base = None if workload.kind == "engineer" else self.base(workload)
        options = {"parameters": workload.parameters, "images": workload.images}
        options |= {"captions": workload.captions, "side": workload.side}
        tasks = {"train": "prepare_training", "caption": "prepare_captioning", "engineer": "prepare_source"}
        task, needs_torch = tasks[workload.kind], workload.kind != "engineer"
        job = Job("benchmarks.replica", task, data, data / "prepared", base, self.threads, needs_torch, options=options)
        prepared = run_job(job)
        return Job("", workload.kind, data, data, base, self.threads, needs_torch, options=prepared)

    def base(self, workload: Workload) -> Path:
        """The base's directory, built when the first workload wants it."""
        folder = self.root / "bases" / workload.base
        note = folder / "prepared.json"
        if not note.is_file():
            weights = {"dtype": workload.dtype, "device": workload.device}
            options = {"base": workload.base, "weights": weights}
            job = Job("benchmarks.replica", "prepare_base", folder, folder, None, self.threads, options=options)
            note.write_text(json.dumps(run_job(job)), encoding="utf-8")
        return Path(read_json(note)["path"])

    def _pairs(self, workload: Workload, folder: Path) -> MeasurePair:
        """Prepares a workload; the function it gives measures baseline and project once, and checks the first pair."""
        job = self.prepare(workload, folder / "data")

        def measure(number: int) -> tuple[dict[str, Record], Record]:
            pair: dict[str, Record] = {}
            for side in SIDES:
                module = _MODULES.get((side, workload.kind), "benchmarks.project")
                scratch = folder / f"{side}-{number}"
                check = number == 0 and workload.kind == "train"
                pair[side] = run_job(replace(job, module=module, scratch=scratch, check=check))
                seconds, memory = pair[side]["seconds"], peak(pair[side])
                report(f"{workload.key} {side} {number + 1}: {seconds:.1f} s, {memory:.0f} MB")
                shutil.rmtree(scratch / "arrow", ignore_errors=True)
            return pair, self._check(workload, job, pair, number)

        return measure

    def _check(self, workload: Workload, job: Job, pair: dict[str, Record], number: int) -> Record:
        """Whether both sides did the same work."""
        if workload.kind == "caption":
            return check_captions(pair)
        if workload.kind == "engineer" or number > 0:
            return {}
        adapters = {side: pair[side]["adapter"] for side in SIDES}
        judge = replace(job, module="benchmarks.judge", task="judge", scratch=job.data / "judge")
        return check_training(workload, pair, run_job(replace(judge, options={"adapters": adapters})))

    def _startup(self, folder: Path) -> MeasurePair:
        empty = startup.make_empty_project(folder / "empty", importlib.metadata.version("kedro"))
        projects = {"baseline": empty, "project": PROJECT}
        for project in projects.values():  # once unmeasured: writes the bytecode caches
            startup.time_start(project)
        heavy = sorted({"torch", "transformers", "peft"} & startup.imported_modules(PROJECT))

        def measure(_number: int) -> tuple[dict[str, Record], Record]:
            pair = {side: startup.time_start(project) for side, project in projects.items()}
            return pair, {"failures": [f"{name} is imported" for name in heavy]}

        return measure


class JobError(RuntimeError):
    """A job's process failed.

    Attributes:
        code: its exit code; negative for a signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_job(job: Job) -> Record:
    """Carry out a job in a fresh process.

    Raises:
        JobError: when it fails, with the end of its output.
    """
    job.scratch.mkdir(parents=True, exist_ok=True)
    file, result, log = (job.scratch / name for name in ("job.json", "result.json", "log.txt"))
    job.write(file)
    paths = (str(PROJECT), str(PROJECT / "src"), os.environ.get("PYTHONPATH"))
    environment = {
        **os.environ,
        # The code beside the bench is measured, whatever copy of it is installed.
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(job.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(job.scratch / "arrow"),
        "DO_NOT_TRACK": "1",
    }
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker", str(file), str(result)],
            cwd=job.data,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        raise JobError(f"{job.module}.{job.task} failed with exit code {done.returncode}:\n{tail}", done.returncode)
    outcome: Record = read_json(result)
    return outcome


def peak(run: Record) -> float:
    """Peak memory of a run in MiB: of the GPU where one was used."""
    on_gpu: float | None = run.get("peak_cuda_mb")
    return float(on_gpu if on_gpu else run["peak_mb"])


def check_training(workload: Workload, pair: dict[str, Record], verdict: Record) -> Record:
    """Tensors, image tokens, scored tokens, steps, untrained loss and validation loss, side by side."""
    first = {side: {**pair[side]["check"], "steps": pair[side]["steps"]} for side in SIDES}
    failures = [] if verdict["tensors_equal"] else ["the adapters' tensors differ"]
    for name in ("image_tokens", "scored_tokens", "steps"):
        values = [first[side][name] for side in SIDES]
        failures += [f"{name} differ: {values}"] if values[0] != values[1] else []
    pairs = {
        "first_loss": ([first[side]["first_loss"] for side in SIDES], UNTRAINED_TOLERANCE[workload.dtype]),
        "validation_loss": ([verdict["validation_loss"][side] for side in SIDES], workload.tolerance),
    }
    for name, ((ours, theirs), tolerance) in pairs.items():
        difference = abs(ours - theirs) / abs(theirs)
        failures += [f"{name} differs by {difference:.3%}, allowed {tolerance:.3%}"] if difference > tolerance else []
    return {**verdict, **{f"{side}_first": first[side] for side in SIDES}, "failures": failures}


def check_captions(pair: dict[str, Record]) -> Record:
    """The share of captions that both sides write alike, of the base and of the tuned model."""
    shares = {}
    for name in ("base_captions", "tuned_captions"):
        captions = list(zip(*(pair[side].pop(name) for side in SIDES), strict=True))
        shares[name] = sum(ours.strip() == theirs.strip() for ours, theirs in captions) / len(captions)
    failures = [f"only {share:.0%} of {name} are equal" for name, share in shares.items() if share < 1]
    return {"equal_share": shares, "failures": failures}


def check_images(workload: Workload, runs: dict[str, list[Record]]) -> Record:
    """Whether both sides took every image, and how many each second."""
    counts = {side: [run["images"] for run in runs[side]] for side in SIDES}
    rates = {side: round(workload.images / median(run["seconds"] for run in runs[side]), 1) for side in SIDES}
    wrong = {side: found for side, found in counts.items() if set(found) != {workload.images}}
    failures = [f"{side} took {found} of {workload.images} images" for side, found in wrong.items()]
    return {"images_per_second": rates, "failures": failures}


def without_paths(runs: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """Runs as results keep them: where their adapters lay says nothing any more."""
    return {
        side: [{name: value for name, value in run.items() if name != "adapter"} for run in made]
        for side, made in runs.items()
    }


def summarize(workload: Workload, runs: dict[str, list[Record]], checks: Record) -> Record:
    """Medians, figures against their targets, checks, and every single run.

    From QUARTILE_FROM pairs on, the lower quartile of the pairs' ratios is held against the target, else the ratio of
    the medians.
    """
    slower = workload.max_ratio is not None
    seconds = {side: median(run["seconds"] for run in runs[side]) for side in SIDES}
    peaks = {side: median(peak(run) for run in runs[side]) for side in SIDES}
    ratio, share = _ratio(seconds, slower=slower), peaks["project"] / peaks["baseline"]
    busy = {side: [run["cpu_s"] for run in runs[side]] for side in SIDES}
    pairs = [
        _ratio({side: run["seconds"] for side, run in zip(SIDES, pair, strict=True)}, slower=slower)
        for pair in zip(*(runs[side] for side in SIDES), strict=True)
    ]
    quartile = quantiles(pairs, n=4, method="inclusive")[0] if len(pairs) >= QUARTILE_FROM and not slower else None
    judged = ratio if quartile is None else quartile
    reached = [
        workload.min_ratio is None or judged >= workload.min_ratio,
        workload.max_ratio is None or judged <= workload.max_ratio,
        workload.max_memory is None or share <= workload.max_memory,
        not checks["failures"],
    ]
    return {
        "baseline_s": round(seconds["baseline"], 3),
        "project_s": round(seconds["project"], 3),
        "ratio": round(ratio, 3),
        "lower_quartile": quartile and round(quartile, 3),
        "judged": round(judged, 3),
        "cpu_ratio": round(_ratio({side: median(busy[side]) for side in SIDES}, slower=slower), 3),
        "noise": _noise(runs) if len(pairs) > 1 else None,
        "ratio_of": "project/baseline" if slower else "baseline/project",
        "baseline_peak_mb": round(peaks["baseline"], 1),
        "project_peak_mb": round(peaks["project"], 1),
        "peak_share": round(share, 3),
        "target": {"ratio": workload.max_ratio if slower else workload.min_ratio, "peak_share": workload.max_memory},
        "reached": all(reached),
        "checks": checks,
        "runs": without_paths(runs),
    }


def _ratio(of: Mapping[str, float], *, slower: bool) -> float:
    return of["project"] / of["baseline"] if slower else of["baseline"] / of["project"]


def _noise(runs: Mapping[str, Sequence[Record]]) -> Record:
    """How far runs of the same work lie apart: the largest over the smallest, of the side where it is more."""

    def spread(name: str) -> float:
        measured = [[run[name] for run in runs[side]] for side in SIDES]
        return round(max(max(side) / min(side) for side in measured), 3)

    return {"wall": spread("seconds"), "cpu": spread("cpu_s")}


def report(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)
