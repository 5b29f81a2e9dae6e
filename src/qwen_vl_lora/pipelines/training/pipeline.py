"""The training pipeline."""

from kedro.pipeline import Pipeline

from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.pipelines.encoding import encode_images_node
from qwen_vl_lora.pipelines.training.nodes import plot_training, train_adapter


def create_pipeline() -> Pipeline:
    """encode_images → train_adapter → plot_training."""
    return Pipeline(
        [
            encode_images_node(),
            described_node(
                train_adapter,
                inputs=[
                    "base_model",
                    "images",
                    "image_features",
                    "train_conversations",
                    "validation_conversations",
                    "workspace",
                    "params:settings",
                ],
                outputs=["adapter", "training_log", "training_summary", "batch_preview", "left_out_samples"],
                tags=["compute"],
            ),
            described_node(
                plot_training,
                inputs="training_log",
                outputs="training_curves",
            ),
        ],
        tags="training",
    )
