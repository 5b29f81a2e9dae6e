"""What is done on the host, in the order of its value, and what it is expected to take."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.full_size import ONE_PASS_STEPS, OVERFITTING, halved
from benchmarks.gpu_box.flops import utilization
from benchmarks.gpu_box.ledger import Part, SkippedError, read_lines
from benchmarks.jobs import Job
from benchmarks.machine import H200_BF16_TFLOPS
from benchmarks.measuring import SIDES, UNTRAINED_TOLERANCE, Bench, JobError, Record, check_training, peak, run_job
from benchmarks.replica import GEOMETRIES
from benchmarks.workloads import Workload

KILLED = -9
GPU: dict[str, Any] = {"dtype": "bfloat16", "device": "cuda", "checkpointing": True, "tolerance": 0.02}
JOBS = {
    # 496 samples, 2 epochs, 62 steps: the tutorials' headline job.
    "2b": Workload("GPU_2b", "train", base="2b", images=496, **GPU),
    # The 7B tutorial's picture size, as many samples and epochs as the headline job.
    "7b": Workload("GPU_7b", "train", base="7b", images=496, side=252, **GPU),
}
NARROW = {"2b": "toy", "7b": "narrow-2.5"}
"""In a rehearsal: the first fast enough for the proofs, the second with Qwen's own vocabulary."""
FREE = {
    "training_args": {
        "per_device_train_batch_size": "auto",
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 16,
    }
}
"""The same optimizer steps, divided as memory allows."""

CHECKPOINTS = {
    "training_args": {
        **ONE_PASS_STEPS["training_args"],
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    },
    "resume": "auto",
}
"""Eight steps, each with a checkpoint."""


@dataclass(frozen=True)
class Box:
    """The host's work folder and the sizes.

    Attributes:
        work: bases, data and adapters; kept for a second call.
        rehearsed: narrow models on a CPU.
        file: results so far, where the comparison of both sides finds their figures.
        code: which of them count.
        peak_tflops: dense bf16 peak of the GPU.
    """

    work: Path
    rehearsed: bool
    file: Path
    code: str
    peak_tflops: float = H200_BF16_TFLOPS

    def parts(self) -> list[Part]:
        """All parts, the most telling first; the seconds are guesses for an H200 until one was measured."""
        return [
            Part("2b, bfloat16 against float32 on the CPU", 110, self.compare_precisions),
            Part("2b, 16 samples overfitted", 45, self.overfit),
            Part("2b, killed and resumed", 70, self.resume),
            *self._measured("2b", (50, 45, 150, 60)),
            Part("2b, attention", 30, lambda: self.attention("2b")),
            Part("2b, FlexAttention", 60, self.flex_attention, ("2b, project",)),
            Part("2b, patch embedding", 20, self.patch_embedding),
            *self._measured("7b", (150, 90, 200, 120)),
            Part("7b, attention", 30, lambda: self.attention("7b")),
            Part("2b, QLoRA", 60, self.quantized),
        ]

    def _measured(self, name: str, seconds: tuple[int, int, int, int]) -> Iterable[Part]:
        ours, free, theirs, judged = seconds
        job = self.job(name)
        yield Part(f"{name}, project", ours, lambda: self.measure(job, "project"))
        yield Part(f"{name}, project, batch auto", free, lambda: self.measure(job, "project", "free", FREE))
        yield Part(f"{name}, tutorials", theirs, lambda: self.measure(job, "baseline"))
        both = (f"{name}, tutorials", f"{name}, project")
        yield Part(f"{name}, same work", judged, lambda: self.judge(name, both), both)

    def job(self, name: str) -> Workload:
        """A job of `JOBS`, or its rehearsal."""
        job = JOBS[name]
        return replace(job.toy(), base=NARROW[name], dtype="float32", device="cpu") if self.rehearsed else job

    @property
    def few(self) -> Workload:
        """Sixteen samples for the proofs."""
        job = self.job("2b")
        return replace(OVERFITTING, key="few", base=job.base, side=job.side, dtype=job.dtype, device=job.device)

    def compare_precisions(self) -> Record:
        """Two samples' loss on the device within a bound of the CPU's."""
        return self._run(self.few, "benchmarks.gpu_box.tasks", "compare_precisions", "compared")

    def overfit(self) -> Record:
        """Sixteen samples, until the loss is half."""
        found = halved(self._run(self.few, "benchmarks.project", "train", "overfitted", ONE_PASS_STEPS)["summary"])
        return {**found, "failures": [] if found["halved"] else ["the loss did not halve"]}

    def resume(self) -> Record:
        """A training that is killed and resumed, beside one that is not: adapters equal bit for bit."""
        whole = self._train_few("whole")
        try:
            self._run(self.few, "benchmarks.gpu_box.tasks", "train_and_kill", "resumed", CHECKPOINTS)
        except JobError as error:
            if error.code != KILLED:
                raise
        resumed = self._train_few("resumed", fresh=False)
        found = {"steps": resumed["steps"], "resumed_from": resumed["summary"]["resumed_from"]}
        differs = _differing(whole, resumed)
        if not differs:
            return {**found, "failures": [] if found["resumed_from"] else ["it did not resume"]}
        # Is it the resuming, or does this machine not repeat itself?
        repeats = _differing(whole, self._train_few("again"))
        return {**found, "differing": differs, "differing_without_a_kill": repeats, "failures": ["weights differ"]}

    def _train_few(self, scratch: str, *, fresh: bool = True) -> Record:
        return self._run(self.few, "benchmarks.project", "train", scratch, CHECKPOINTS, fresh=fresh)

    def measure(self, job: Workload, side: str, scratch: str | None = None, changes: Record | None = None) -> Record:
        """One side of a job: seconds, peak, samples a second and MFU, this project's peak beside the plan's."""
        module = "benchmarks.tutorial" if side == "baseline" else "benchmarks.gpu_box.tasks"
        run = self._run(job, module, "train", scratch or side, changes, check=True)
        run["adapter"] = str(Path(run["adapter"]).relative_to(self.work))
        memory = {"peak_used_mb": peak(run), "planned_mb": run["check"].get("planned_mb")}
        return {**run, **utilization(job, run, self.peak_tflops), **memory}

    def judge(self, name: str, both: tuple[str, ...]) -> Record:
        """Whether both sides did the same work, and the ratios of their figures."""
        pair = {side: self._found(part) for side, part in zip(SIDES, both, strict=True)}
        adapters = {side: str(self.work / run["adapter"]) for side, run in pair.items()}
        if not all(Path(path).is_dir() for path in adapters.values()):
            raise SkippedError("the adapters lie on another machine")
        job = self.job(name)
        verdict = self._run(job, "benchmarks.judge", "judge", "judged", adapters=adapters)
        ours, theirs = pair["project"], pair["baseline"]
        ratios = {
            "ratio": round(theirs["seconds"] / ours["seconds"], 2),
            "training_ratio": round(theirs["train_s"] / ours["train_s"], 2),
            "peak_share": round(ours["peak_used_mb"] / theirs["peak_used_mb"], 3),
        }
        return {**ratios, **check_training(job, pair, verdict)}

    def _found(self, part: str) -> Record:
        """The figures of a part that is done."""
        counting = (line for line in read_lines(self.file) if (line["state"], line["code"]) == ("done", self.code))
        return next(line for line in counting if line["part"] == part)

    def attention(self, name: str) -> Record:
        """FlexAttention beside the dense mask, at a job's head geometry."""
        geometry = GEOMETRIES[self.job(name).base]
        heads = {"heads": geometry.heads, "key_value_heads": geometry.key_value_heads}
        width = geometry.hidden // geometry.heads
        task = ("benchmarks.gpu_box.tasks", "attention", f"attention-{name}")
        return self._run(self.few, *task, **heads, head_width=width)

    def flex_attention(self) -> Record:
        """The headline job with FlexAttention, its first loss beside that with SDPA."""
        if self.rehearsed:
            raise SkippedError("torch computes FlexAttention's gradients on GPUs only")
        with_sdpa = self._found("2b, project")
        run = self.measure(self.job("2b"), "project", "flex", {"attention": "flex_attention"})
        first, other = (one["summary"]["first_loss"] for one in (run, with_sdpa))
        difference, bound = abs(first - other) / other, UNTRAINED_TOLERANCE["bfloat16"]
        failures = [f"the first losses differ by {difference:.3%}, allowed {bound:.0%}"] if difference > bound else []
        ratio = round(with_sdpa["train_s"] / run["train_s"], 2)
        return {**run, "first_loss_difference": difference, "training_ratio": ratio, "failures": failures}

    def patch_embedding(self) -> Record:
        """Conv3d beside the product."""
        width = GEOMETRIES[self.job("2b").base].vision_width
        return self._run(self.few, "benchmarks.gpu_box.tasks", "patch_embedding", "patches", width=width)

    def quantized(self) -> Record:
        """The headline job on a base in nf4."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise SkippedError("bitsandbytes is not installed")
        return self.measure(self.job("2b"), "project", "quantized", {"quantization": "nf4"})

    def _run(
        self,
        workload: Workload,
        module: str,
        task: str,
        scratch: str,
        changes: Record | None = None,
        *,
        check: bool = False,
        fresh: bool = True,
        **options: Any,
    ) -> Record:
        """A task in a process of its own, with caches of its own unless they are to be found again."""
        job = self._prepared(workload)
        folder = self.work / workload.key / scratch
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        options |= {"changes": changes or {}}
        return run_job(replace(job, module=module, task=task, scratch=folder, check=check, options=options))

    def _prepared(self, workload: Workload) -> Job:
        """Base and data of a workload, made by the first part that wants them."""
        folder = self.work / workload.key
        note = folder / "job.json"
        if not note.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            threads = 1 if self.rehearsed else 8
            Bench(self.work, threads).prepare(workload, folder / "data").write(note)
        return Job.read(note)


def _differing(one: Record, other: Record) -> list[str]:
    """Names of the tensors that are not equal bit for bit in two adapters, the first few."""
    from safetensors.numpy import load_file

    first, second = (load_file(Path(run["adapter"]) / "adapter_model.safetensors") for run in (one, other))
    return [name for name in sorted(first) if first[name].tobytes() != second[name].tobytes()][:5]
