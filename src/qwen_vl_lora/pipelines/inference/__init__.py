"""Captions for the user's own pictures."""

from qwen_vl_lora.pipelines.inference.pipeline import create_pipeline

__all__ = ["create_pipeline"]
