"""Nodes of the training pipeline. torch comes in when a node runs, not when pipelines are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def train_adapter(
    base_model: BaseModel,
    images: ImageStore,
    image_features: FeatureStore,
    train_conversations: Sequence[dict[str, Any]],
    validation_conversations: Sequence[dict[str, Any]],
    workspace: Workspace,
    settings: Parameters,
) -> tuple[Path, Table, dict[str, Any], dict[str, Any], Table]:
    """Fit a LoRA adapter on the training split."""
    from qwen_vl_lora.samples.conversations import Conversations
    from qwen_vl_lora.samples.rejections import rejection_table
    from qwen_vl_lora.tracking.tracker import current_tracker
    from qwen_vl_lora.training.data import TrainingData
    from qwen_vl_lora.training.fit import fit_adapter

    train, validation = Conversations(train_conversations), Conversations(validation_conversations)
    data = TrainingData(images, image_features, train, validation)
    tracker = current_tracker()
    on_row = None if tracker is None else tracker.log_row
    fitted = fit_adapter(base_model, data, settings, workspace, on_row)
    left_out = rejection_table(fitted.left_out)
    return fitted.directory, fitted.log_table(), fitted.summary, fitted.preview, left_out


def plot_training(training_log: Table) -> Any:
    """Loss, validation loss and learning rate over the optimizer steps."""
    from qwen_vl_lora.training.curves import plot_training_curves

    return plot_training_curves(training_log)
