"""base_model, adapter ─► merge_adapter ─► merged_model"""

from __future__ import annotations

from kedro.pipeline import Pipeline, pipeline

from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.pipelines.export.nodes import merge_adapter


def create_pipeline() -> Pipeline:
    """Merge the adapter into its base model, check the result, publish it with a card."""
    return pipeline(
        [
            described_node(
                merge_adapter,
                inputs=[
                    "base_model",
                    "adapter",
                    "images",
                    "test_conversations",
                    "caption_metrics",
                    "workspace",
                    "params:settings",
                ],
                outputs="merged_model",
                tags=["compute"],
            )
        ],
        tags="export",
    )
