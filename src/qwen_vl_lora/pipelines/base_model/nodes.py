"""Nodes of the `base_model` pipeline. torch is imported when they run, not when they are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from qwen_vl_lora.samples.workspace import Workspace


def build_base_model(workspace: Workspace) -> Path:
    """Pre-train the shipped recipe; a killed run resumes from its checkpoint in the workspace."""
    from qwen_vl_lora.tiny.pretraining import SHIPPED_RECIPE
    from qwen_vl_lora.tiny.tiny_base import build_tiny_base

    return build_tiny_base(workspace.path / "tiny_base", SHIPPED_RECIPE)


def measure_base_model(tiny_base: Path) -> dict[str, float]:
    """Measure the stored model on held-out scenes: whole, blanked and swapped pictures."""
    from qwen_vl_lora.tiny.quality import measure_quality

    return asdict(measure_quality(tiny_base))
