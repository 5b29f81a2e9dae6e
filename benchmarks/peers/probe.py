"""What is looked at in every peer, since all three train with a child of transformers' Trainer.

Runs in the peer's own environment: imports torch and transformers only.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any


class Probe:
    """Notes the training loop's seconds, the trainable tensors, the first loss and the pictures that are seen."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"image_features": None}

    def install(self) -> None:
        """Wrap `Trainer.train`, which each tool calls once."""
        from transformers import Trainer

        original, facts = Trainer.train, self.facts

        def train(trainer: Any, *arguments: Any, **keywords: Any) -> Any:
            trainable = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
            facts["trainable_tensors"] = len(trainable)
            facts["trainable_parameters"] = sum(value.numel() for value in trainable.values())
            tower = next(module for name, module in trainer.model.named_modules() if name.endswith("visual"))
            tower.register_forward_hook(self._note_features)
            started = time.perf_counter()
            outcome = original(trainer, *arguments, **keywords)
            facts["train_s"] = round(time.perf_counter() - started, 3)
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            facts.update(steps=trainer.state.global_step, first_loss=float(losses[0]))
            return outcome

        Trainer.train = train

    def _note_features(self, module: Any, inputs: Any, output: Any) -> None:
        if self.facts["image_features"] is None:
            merged = getattr(output, "pooler_output", output)
            self.facts["image_features"] = int(merged.shape[0])

    def write(self, file: Path, started: float, output_dir: Path) -> None:
        """Facts, seconds since `started`, peak memory and the adapter's folder."""
        self.facts["seconds"] = round(time.perf_counter() - started, 3)
        self.facts["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
        adapters = sorted(output_dir.rglob("adapter_model.safetensors"), key=lambda path: path.stat().st_mtime)
        self.facts["adapter"] = str(adapters[-1].parent)
        file.write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
