"""The evaluation pipeline."""

from kedro.pipeline import Pipeline

from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.pipelines.encoding import encode_images_node
from qwen_vl_lora.pipelines.evaluation.nodes import build_report, generate_captions, score_captions


def create_pipeline() -> Pipeline:
    """encode_images → generate_captions → score_captions → build_report."""
    return Pipeline(
        [
            encode_images_node(),
            described_node(
                generate_captions,
                inputs=[
                    "base_model",
                    "adapter",
                    "images",
                    "image_features",
                    "test_conversations",
                    "workspace",
                    "params:settings",
                ],
                outputs="predictions",
                tags=["compute"],
            ),
            described_node(
                score_captions,
                inputs=["predictions", "images", "workspace", "params:settings"],
                outputs=["caption_metrics", "caption_scores"],
            ),
            described_node(
                build_report,
                inputs=[
                    "predictions",
                    "caption_metrics",
                    "caption_scores",
                    "images",
                    "adapter",
                    "caption_statistics",
                    "params:settings",
                ],
                outputs=["comparison_report", "comparison_sheet", "metrics_plot"],
            ),
        ],
        tags="evaluation",
    )
