"""Adapters of small trainings that cover what decides an adapter's bits, by their hashes.

`python -m benchmarks.reference_adapters [--only NAME …] [--against FILE] [--out FILE]` trains each case from the
repository's own configuration in a folder of its own and prints its sha256. Run it before and after a change of
training, on one machine with the same packages and threads; `--against` compares with the other side's `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]

SLICE: dict[str, Any] = {
    "captions": {"num_rows": 60},
    "split": {"test_images": 12, "validation_images": 8},
    "training_args": {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_steps": 4,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "eval_steps": None,
        "logging_steps": 2,
    },
    "device": "cpu",
}

TOWER_TOO = ["q_proj", "v_proj", "down_proj", "qkv", "proj", "fc1"]

CASES: dict[str, dict[str, Any]] = {
    "slice": {},
    "rows separate": {"rows": "separate"},
    "vision adapted": {"vision": "adapted", "lora": {"target_modules": TOWER_TOO}},
    "DoRA": {"lora": {"use_dora": True}},
    "nf4": {"quantization": "nf4"},
    "gradient checkpointing": {"training_args": {"gradient_checkpointing": True}},
    "bf16": {"training_args": {"bf16": True}},
    "bf16, adapted, checkpointing": {
        "vision": "adapted",
        "lora": {"target_modules": TOWER_TOO},
        "training_args": {"bf16": True, "gradient_checkpointing": True},
    },
    "early stopping": {
        "training_args": {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "early_stopping_patience": 2,
            "learning_rate": 0.05,
        }
    },
    "best epoch": {
        "training_args": {
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "warmup_steps": 0,
        }
    },
    "adafactor, cosine, decay, max_steps": {
        "training_args": {
            "optim": "adafactor",
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.1,
            "max_steps": 7,
            "warmup_steps": 0.2,
            "max_grad_norm": 0.0,
        }
    },
    "bias and modules_to_save": {"lora": {"bias": "lora_only"}},
    "dropout": {"lora": {"lora_dropout": 0.2}},
}


def main() -> int:
    given = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given.add_argument("--only", nargs="*", metavar="NAME", help="cases; all without it")
    given.add_argument("--against", type=Path, help="a JSON file that --out wrote")
    given.add_argument("--out", type=Path, help="where the hashes are written as JSON")
    options = given.parse_args()
    names = options.only or [*CASES, "two turns, two pictures", "default recipe"]
    theirs = json.loads(options.against.read_text(encoding="utf-8")) if options.against else {}
    ours: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = make_project(Path(folder) / "project")
        for name in names:
            ours[name] = sha256_of(train(project, name))
            verdict = "" if name not in theirs else " equal" if theirs[name] == ours[name] else " DIFFERENT"
            print(f"| {name} | {ours[name][:16]} |{verdict}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(ours, indent=2), encoding="utf-8")
    return int(any(theirs.get(name, value) != value for name, value in ours.items()))


def make_project(project: Path) -> Path:
    """The repository's configuration and shipped base, without any data."""
    shutil.copytree(PROJECT / "conf", project / "conf")
    shutil.copytree(PROJECT / "data" / "06_models" / "tiny_qwen2_vl", project / "data" / "06_models" / "tiny_qwen2_vl")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, project)
    (project / "src").mkdir()
    return project


def train(project: Path, name: str) -> Path:
    """The published adapter of one case."""
    if name == "default recipe":
        return _run(project, "tiny_default", {}, None)
    if name == "two turns, two pictures":
        source = _write_dialogues(project)
        given = {
            "captions_file": str(source),
            "split": {"test_images": 4},
            "training_args": {"num_train_epochs": 4, "per_device_train_batch_size": 4, "logging_steps": 2},
            "device": "cpu",
        }
        return _run(project, "dialogues", given, "own_captions")
    return _run(project, "tiny", _merge(SLICE, {**CASES[name], "swanlab": {"mode": "disabled"}}), None)


def _run(project: Path, recipe: str, given: dict[str, Any], env: str | None) -> Path:
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    given = {**given, "recipe": recipe, "swanlab": {"mode": "disabled"}}
    stored = project / "data" / "02_intermediate" / recipe / "images"
    pipelines = ["training"] if stored.exists() and recipe == "tiny" else ["data_engineering", "training"]
    with contextlib.chdir(project):
        bootstrap_project(project)
        logging.disable(logging.INFO)
        for pipeline in pipelines:
            with KedroSession.create(project_path=project, env=env, runtime_params=given) as session:
                session.run(pipeline_names=[pipeline])
    return max((project / "data" / "06_models" / recipe / "adapter").iterdir())


def _write_dialogues(project: Path) -> Path:
    """Samples of two pictures and two turns, from drawn scenes."""
    from PIL import Image, ImageDraw

    folder = project / "dialogues"
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(24):
        names = [f"{number}_{side}.png" for side in ("left", "right")]
        for side, name in enumerate(names):
            picture = Image.new("RGB", (120 + 8 * number, 96), (10 * number, 90 * side, 60))
            ImageDraw.Draw(picture).ellipse((20, 20, 60 + number, 70), fill=(200, 9 * number, 30))
            picture.save(folder / name)
        turns = [
            {"role": "user", "content": "<image>What is left, and <image>what is right?"},
            {"role": "assistant", "content": f"Left {number}, right {number + 1}."},
            {"role": "user", "content": "And the sum?"},
            {"role": "assistant", "content": f"It is {2 * number + 1}."},
        ]
        lines.append(json.dumps({"messages": turns, "images": names}))
    file = folder / "dialogues.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for key, value in changes.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged


def sha256_of(adapter: Path) -> str:
    (file,) = adapter.rglob("adapter_model.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
