"""One run of one peer, in its own environment: `python runners.py TOOL JOB.json RESULT.json`.

Knows nothing of this project. The job names base, rows, output folder, threads, and the settings that
every tool shares by transformers' own names. The clock starts when the tool is imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from probe import Probe

HERE = Path(__file__).parent

Job = dict[str, Any]


def run_trl(job: Job, probe: Probe) -> float:
    """TRL: prompt and completion apart (`messages` would train on the prompt too), pictures decoded on the fly."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    from datasets import Dataset, Image, List

    probe.install()
    started = time.perf_counter()
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": row["caption"]}]}],
            "images": [row["image"]],
        }
        for row in job["rows"]
    ]
    own = json.loads((HERE / "trl.json").read_text(encoding="utf-8"))
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(job["base"], dtype=torch.float32),
        args=SFTConfig(output_dir=job["output"], use_cpu=True, report_to="none", **job["shared"], **own),
        train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
        processing_class=AutoProcessor.from_pretrained(job["base"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", exclude_modules=r"(.*\.)?visual\..*", **job["lora"]),
    )
    trainer.train()
    return started


def run_ms_swift(job: Job, probe: Probe) -> float:
    """ms-swift: frozen tower under no_grad, logits on answers only.

    Its template hard-codes the image token of Qwen's vocabulary and trains without pictures, silently,
    where another id stands for them. The replica's id is put in its place: the work is then equal, and
    the vocabulary, whose logits it computes, stays a sixteenth.
    """
    from swift.pipelines import sft_main
    from swift.template.templates import qwen

    qwen.Qwen2VLTemplate.image_token_id = job["image_token_id"]
    data = Path(job["output"]) / "rows.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"<image>{row['prompt']}"},
                    {"role": "assistant", "content": row["caption"]},
                ],
                "images": [row["image"]],
            }
        )
        for row in job["rows"]
    ]
    data.write_text("\n".join(lines), encoding="utf-8")
    lora = job["lora"]
    settings = {
        **json.loads((HERE / "ms_swift.json").read_text(encoding="utf-8")),
        **job["shared"],
        "model": job["base"],
        "model_type": "qwen2_vl",
        "dataset": str(data),
        "output_dir": job["output"],
        "lora_rank": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "use_cpu": True,
        "report_to": "none",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", _as_text(value))]
    probe.install()
    started = time.perf_counter()
    sft_main([*arguments, "--target_modules", *lora["target_modules"]])
    return started


def run_llama_factory(job: Job, probe: Probe) -> float:
    """LLaMA-Factory: sharegpt rows, frozen tower and projector."""
    import yaml
    from llamafactory.train.tuner import run_exp

    folder = Path(job["output"]) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{row['prompt']}"},
                {"role": "assistant", "content": row["caption"]},
            ],
            "images": [row["image"]],
        }
        for row in job["rows"]
    ]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    info = {"bench": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    shared = dict(job["shared"])
    checkpointing = shared.pop("gradient_checkpointing")
    lora = job["lora"]
    settings = {
        **yaml.safe_load((HERE / "llama_factory.yaml").read_text(encoding="utf-8")),
        **shared,
        "disable_gradient_checkpointing": not checkpointing,
        "model_name_or_path": job["base"],
        "dataset": "bench",
        "dataset_dir": str(folder),
        "output_dir": job["output"],
        "lora_rank": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": lora["lora_dropout"],
        "lora_target": ",".join(lora["target_modules"]),
        "use_cpu": True,
        "report_to": "none",
    }
    probe.install()
    started = time.perf_counter()
    run_exp(settings)
    return started


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def main(tool: str, job_file: Path, result: Path) -> None:
    """Run one tool and write what was seen of it."""
    import torch

    job = json.loads(job_file.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    probe = Probe()
    tools = {"trl": run_trl, "ms_swift": run_ms_swift, "llama_factory": run_llama_factory}
    started = tools[tool](job, probe)
    probe.write(result, started, Path(job["output"]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
