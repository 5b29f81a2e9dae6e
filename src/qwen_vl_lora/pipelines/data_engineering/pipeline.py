"""captioned_images ─► collect_samples ─► build_conversations ─► split_conversations ─► build_data_page.

describe_captions stands beside them.
"""

from __future__ import annotations

from kedro.pipeline import Pipeline, pipeline

from qwen_vl_lora.pipelines.data_engineering.nodes import (
    build_conversations,
    build_data_page,
    collect_samples,
    describe_captions,
    split_conversations,
)
from qwen_vl_lora.pipelines.described import described_node


def create_pipeline() -> Pipeline:
    """From a source of captioned images to conversations, split by image."""
    return pipeline(
        [
            described_node(
                collect_samples,
                inputs=["captioned_images", "workspace", "params:settings"],
                outputs=[
                    "images",
                    "samples",
                    "caption_table",
                    "rejected_samples",
                    "rejected_pictures",
                    "collection_summary",
                ],
            ),
            described_node(
                build_conversations,
                inputs=["samples", "images", "params:prompt"],
                outputs="conversations",
            ),
            described_node(
                split_conversations,
                inputs=["conversations", "images", "params:split"],
                outputs=["train_conversations", "validation_conversations", "test_conversations", "split_summary"],
            ),
            described_node(
                describe_captions,
                inputs=["samples", "images", "collection_summary"],
                outputs=["caption_statistics", "caption_length_plot", "image_sheet"],
            ),
            described_node(
                build_data_page,
                inputs=[
                    "samples",
                    "images",
                    "rejected_samples",
                    "rejected_pictures",
                    "caption_statistics",
                    "split_summary",
                    "params:settings",
                ],
                outputs="data_page",
            ),
        ],
        tags="data_engineering",
    )
