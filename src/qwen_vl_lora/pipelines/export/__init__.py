"""The adapter merged into its base model."""

from qwen_vl_lora.pipelines.export.pipeline import create_pipeline

__all__ = ["create_pipeline"]
