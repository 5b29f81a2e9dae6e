"""From conversations and pictures to an adapter."""

from qwen_vl_lora.pipelines.training.pipeline import create_pipeline

__all__ = ["create_pipeline"]
