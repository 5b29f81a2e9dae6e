"""Rebuilds the tiny base model from nothing and measures it."""

from qwen_vl_lora.pipelines.base_model.pipeline import create_pipeline

__all__ = ["create_pipeline"]
