"""Captioned images to conversations, split by image."""

from qwen_vl_lora.pipelines.data_engineering.pipeline import create_pipeline

__all__ = ["create_pipeline"]
