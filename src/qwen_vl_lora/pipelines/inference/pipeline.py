"""base_model, adapter, inference.images ─► caption_pictures ─► captions, caption_sheet"""

from __future__ import annotations

from kedro.pipeline import Pipeline, pipeline

from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.pipelines.inference.nodes import caption_pictures


def create_pipeline() -> Pipeline:
    """Caption a folder, a picture or a table of the user's."""
    return pipeline(
        [
            described_node(
                caption_pictures,
                inputs=[
                    "base_model",
                    "adapter",
                    "workspace",
                    "params:settings",
                ],
                outputs=["captions", "caption_sheet"],
                tags=["compute"],
            )
        ],
        tags="inference",
    )
