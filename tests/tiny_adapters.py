"""Adapters of tiny bases, as this project writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_vl_lora.model.adapter import RECORD_FILE, Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.parameters import LoraParameters

SHA256 = "0123456789abcdef" * 4

LORA = LoraParameters(
    r=2, lora_alpha=4, lora_dropout=0.0, bias="none", target_modules=["q_proj"], use_rslora=False, use_dora=False
)


def adapter_record(base: BaseModel | None = None, **changes: Any) -> dict[str, Any]:
    """A whole record, of the form of commit 981ed87; `changes` replace blocks of it."""
    split = {"sha256": SHA256, "samples": 1}
    record = {
        "base_model": {
            "name": "data/06_models/tiny",
            "revision": None,
            "fingerprint": base.fingerprint if base else SHA256,
            "files": base.files if base else {},
        },
        "prompt": {"user": "Describe this picture.", "system": None, "override": False},
        "image": {
            "resized_height": None,
            "resized_width": None,
            "min_pixels": 56 * 56,
            "max_pixels": 140 * 140,
            "max_source_pixels": 10**6,
            "max_aspect_ratio": 200.0,
            "allowed_roots": [],
            "allow_urls": False,
            "url_hosts": [],
            "url_timeout": 20.0,
            "url_max_bytes": 10**6,
        },
        "generation": {"max_new_tokens": 7, "repetition_penalty": 1.0, "batch_size": 2},
        "max_length": 128,
        "vision": "frozen",
        "rows": "shared",
        "attention": "sdpa",
        "quantization": None,
        "lora": LORA.model_dump(),
        "training_args": {"bf16": False, "fp16": False, "learning_rate": 0.001, "max_steps": -1},
        "parent": None,
        "data": {"train_conversations": split, "validation_conversations": split},
        "training": {"steps": 1, "trainable_parameters": 1, "train_loss": 0.5, "resumed_from": None},
    }
    return {**record, **changes}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


def save_adapter(folder: Path, base: BaseModel, lora: LoraParameters = LORA, **changes: Any) -> Adapter:
    """Fresh weights with their record; they change nothing yet."""
    add_adapter(base.load_model("float32", "cpu"), lora, "frozen", seed=0).save_pretrained(folder)
    write_record(folder, adapter_record(base, lora=lora.model_dump(), **changes))
    return Adapter(folder)
