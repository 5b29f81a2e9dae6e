"""Nodes of the training pipeline. torch comes in when a node runs, not when pipelines are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import (
    GenerationParameters,
    ImageParameters,
    LauncherParameters,
    LoraParameters,
    PromptParameters,
    QuarantineParameters,
    TrainingParameters,
)
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def train_adapter(
    base_model: BaseModel,
    images: ImageStore,
    image_features: FeatureStore,
    train_conversations: list[dict[str, Any]],
    validation_conversations: list[dict[str, Any]],
    workspace: Workspace,
    prompt: PromptParameters,
    image: ImageParameters,
    max_length: int,
    quarantine: QuarantineParameters,
    lora: LoraParameters,
    training_args: TrainingParameters,
    vision: str,
    rows: str,
    resume: str,
    device: str,
    launcher: LauncherParameters,
    attention: str,
    quantization: str | None,
    init_adapter: str | None,
    generation: GenerationParameters,
) -> tuple[Path, Table, dict[str, Any], dict[str, Any], Table]:
    """Fit a LoRA adapter on the training split."""
    from qwen_vl_lora.samples.rejections import rejection_table
    from qwen_vl_lora.tracking.tracker import current_tracker
    from qwen_vl_lora.tuning.data import TrainingData
    from qwen_vl_lora.tuning.fit import fit_adapter
    from qwen_vl_lora.tuning.settings import TrainingSettings

    data = TrainingData(images, image_features, train_conversations, validation_conversations)
    settings = TrainingSettings(
        prompt=prompt,
        image=image,
        max_length=max_length,
        max_share=quarantine.max_share,
        lora=lora,
        training_args=training_args,
        vision=vision,  # type: ignore[arg-type]
        rows=rows,  # type: ignore[arg-type]
        resume=resume,
        device=device,
        attention=attention,
        quantization=quantization,
        init_adapter=init_adapter,
        generation=generation,
    )
    tracker = current_tracker()
    on_log = None if tracker is None else tracker.log_row
    fitted = fit_adapter(base_model, data, settings, workspace.path, on_log, launcher)
    left_out = rejection_table(fitted.left_out)
    return fitted.directory, fitted.log_table(), fitted.summary, fitted.preview, left_out


def plot_training(training_log: Table) -> Any:
    """Loss, validation loss and learning rate over the optimizer steps."""
    from qwen_vl_lora.tuning.curves import plot_training_curves

    return plot_training_curves(training_log)
