"""`make bench-peers`: W1 and W2 on TRL, ms-swift and LLaMA-Factory, with this project in the same run.

    python -m benchmarks.peers.run [--only trl,…] [--workloads W1,W2] [--checkpointing] [--repeats N]
                                  [--environments FOLDER]

Each tool gets an environment of its own from its requirements file, about 6 GB each. A time counts
only where the number of image features, the trainable tensors and the first loss are right.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import Job, read_json, write_json
from benchmarks.machine import current_commit, describe_machine
from benchmarks.measuring import PROJECT, Bench, Record, report, run_job, without_paths
from benchmarks.workloads import Workload, choose
from qwen_vl_lora.model.fingerprints import stored_tensors

HERE = Path(__file__).parent
TOOLS = ("trl", "ms_swift", "llama_factory")
FIRST_LOSS_TOLERANCE = 0.02
"""Relative. Each tool draws its own first step, so this tells seeing the pictures and the answers from not."""
SHARED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "gradient_checkpointing",
    "logging_steps",
    "logging_first_step",
    "save_steps",
    "seed",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tools that were asked for, and write their results after each workload."""
    options = _parse(arguments)
    options.environments.mkdir(parents=True, exist_ok=True)
    pythons = {tool: make_environment(tool, options.environments) for tool in options.only.split(",")}
    results: Record = {"commit": current_commit(PROJECT), "machine": describe_machine(), "workloads": {}}
    results["versions"] = {tool: installed(python) for tool, python in pythons.items()}
    file = RESULTS / f"{results_name(results['machine'])}-peers.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-peers-") as root:
        bench = Bench(Path(root), options.threads)
        for workload in choose(options.workloads):
            if workload.checkpointing and not options.checkpointing:
                continue
            results["workloads"][workload.key] = measure(bench, workload, pythons, options.repeats)
            write_json(file, results)
            file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    print(render_table(results))


def measure(bench: Bench, workload: Workload, pythons: dict[str, Path], repeats: int) -> Record:
    """All tools and the project in turn, `repeats` times."""
    folder = bench.root / workload.key
    folder.mkdir()
    job = bench.prepare(workload, folder / "data")
    runs: dict[str, list[Record]] = {name: [] for name in ("project", *pythons)}
    for number in range(repeats):
        for name in runs:
            scratch = folder / f"{name}-{number}"
            scratch.mkdir()
            run = _run_project(job, scratch) if name == "project" else _run_peer(name, pythons[name], job, scratch)
            runs[name].append(run)
            report(f"{workload.key} {name} {number + 1}/{repeats}: {run['seconds']:.1f} s")
    reference = {**runs["project"][0]["check"], **trainable(Path(runs["project"][0]["adapter"]))}
    medians = {name: median(run["seconds"] for run in values) for name, values in runs.items()}
    peers = [name for name in runs if name != "project" and not failures(runs[name][0], reference, job)]
    fastest = min(peers, key=medians.__getitem__, default=None)
    return {
        "seconds": medians,
        "peak_mb": {name: median(run["peak_mb"] for run in values) for name, values in runs.items()},
        "failures": {name: failures(runs[name][0], reference, job) for name in runs if name != "project"},
        "fastest_peer": fastest,
        "ratio": None if fastest is None else round(medians[fastest] / medians["project"], 3),
        "runs": without_paths(runs),
    }


def _run_project(job: Job, scratch: Path) -> Record:
    return run_job(Job(**{**vars(job), "module": "benchmarks.project", "scratch": scratch, "check": True}))


def _run_peer(tool: str, python: Path, job: Job, scratch: Path) -> Record:
    """One run of a tool in a fresh process and with empty caches.

    Raises:
        RuntimeError: when it fails, with the end of its output.
    """
    parameters = job.parameters
    lora = {name: parameters["lora"][name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    told = {
        "base": str(job.base_path),
        "rows": [_row(record, job.data) for record in job.conversations("train")],
        "output": str(scratch / "output"),
        "threads": job.threads,
        "image_token_id": read_json(job.base_path / "config.json")["image_token_id"],
        "shared": {name: parameters["training_args"][name] for name in SHARED},
        "lora": lora,
    }
    file, result, log = scratch / "job.json", scratch / "result.json", scratch / "log.txt"
    write_json(file, told)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment |= {"HF_DATASETS_CACHE": str(scratch / "arrow"), "MODELSCOPE_CACHE": str(scratch / "modelscope")}
    with log.open("w", encoding="utf-8") as output:
        command = [str(python), str(HERE / "runners.py"), tool, str(file), str(result)]
        done = subprocess.run(command, cwd=scratch, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-30:])
        raise RuntimeError(f"{tool} failed with exit code {done.returncode}:\n{tail}")
    outcome: Record = read_json(result)
    return outcome


def _row(record: dict[str, Any], data: Path) -> dict[str, str]:
    """Prompt, absolute path of the picture, and caption of one conversation."""
    question, answer = (turn["value"] for turn in record["conversations"])
    prompt, _, rest = question.partition("<|vision_start|>")
    return {"prompt": prompt.strip(), "image": str(data / rest.partition("<|vision_end|>")[0]), "caption": answer}


def trainable(adapter: Path) -> dict[str, int]:
    """Tensors and numbers in an adapter's file."""
    tensors = list(stored_tensors(adapter / "adapter_model.safetensors"))
    return {
        "trainable_tensors": len(tensors),
        "trainable_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
    }


def failures(run: Record, reference: Record, job: Job) -> list[str]:
    """Where a tool did other work than this project."""
    per_image = reference["image_tokens"] // len(job.conversations("train"))
    batch = job.parameters["training_args"]["per_device_train_batch_size"]
    found = []
    if run["image_features"] is None or run["image_features"] not in (per_image, per_image * batch):
        found.append(f"{run['image_features']} image features in the first pass, expected {per_image * batch}")
    for name in ("trainable_tensors", "trainable_parameters"):
        if run[name] != reference[name]:
            found.append(f"{name}: {run[name]}, expected {reference[name]}")
    if abs(run["first_loss"] - reference["first_loss"]) > FIRST_LOSS_TOLERANCE * reference["first_loss"]:
        found.append(f"first loss {run['first_loss']:.4f}, expected about {reference['first_loss']:.4f}")
    return found


def make_environment(tool: str, folder: Path) -> Path:
    """The tool's environment, made when it is not there; gives its Python."""
    python = folder / tool / "bin" / "python"
    if not python.is_file():
        report(f"Installing {tool} into {folder / tool}.")
        subprocess.run([sys.executable, "-m", "venv", str(folder / tool)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / f"{tool}.txt")]
        subprocess.run(install, check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions that a comparison depends on."""
    command = [str(python), "-m", "pip", "list", "--format=json"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = {"trl", "ms-swift", "ms_swift", "llamafactory", "torch", "transformers", "peft", "accelerate"}
    return {entry["name"]: entry["version"] for entry in json.loads(listed) if entry["name"].lower() in wanted}


def render_table(results: Record) -> str:
    """Seconds of every tool, as Markdown."""
    names = ["project", *results["versions"]]
    lines = [
        f"{results['machine']}; commit {results['commit']}. Medians of seconds, data to adapter.",
        "",
        f"| workload | {' | '.join(names)} | fastest peer | ratio |",
        f"|---|{'---:|' * len(names)}---|---:|",
    ]
    for key, entry in results["workloads"].items():
        seconds = " | ".join(f"{entry['seconds'][name]:.1f}" if name in entry["seconds"] else "–" for name in names)
        ratio = "–" if entry["ratio"] is None else f"{entry['ratio']:.2f}×"
        lines.append(f"| {key} | {seconds} | {entry['fastest_peer'] or '–'} | {ratio} |")
    lines.append("")
    for key, entry in results["workloads"].items():
        lines += [f"- {key}, {name}: {fault}" for name, faults in entry["failures"].items() for fault in faults]
    return "\n".join(lines).rstrip() + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.run")
    parser.add_argument("--only", default=",".join(TOOLS), help=f"of {', '.join(TOOLS)}")
    parser.add_argument("--workloads", default="W1,W2")
    parser.add_argument("--checkpointing", action="store_true", help="also the workloads with gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    default = Path(tempfile.gettempdir()) / "qwen-vl-lora-peers"
    parser.add_argument("--environments", type=Path, default=default, help="folder of the tools' environments")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
