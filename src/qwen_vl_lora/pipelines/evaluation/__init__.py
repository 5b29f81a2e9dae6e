"""Base against tuned on held-out pictures."""

from qwen_vl_lora.pipelines.evaluation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
