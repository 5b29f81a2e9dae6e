"""Nodes of the evaluation pipeline."""

from __future__ import annotations

from typing import Any

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import (
    GenerationParameters,
    ImageParameters,
    LauncherParameters,
    PromptParameters,
    ScoringParameters,
    TrainingParameters,
)
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def generate_captions(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    image_features: FeatureStore,
    test_conversations: list[dict[str, Any]],
    workspace: Workspace,
    prompt: PromptParameters,
    image: ImageParameters,
    generation: GenerationParameters,
    training_args: TrainingParameters,
    vision: str,
    device: str,
    launcher: LauncherParameters,
    quantization: str | None,
    scoring: ScoringParameters,
) -> Table:
    """Caption the held-out pictures with the base and the tuned model, everything else equal."""
    from qwen_vl_lora.scoring.comparison import compare_captions
    from qwen_vl_lora.scoring.settings import CaptionSettings

    dtype = training_args.dtype
    configured = CaptionSettings(prompt, image, generation, vision, dtype, device, quantization)  # type: ignore[arg-type]
    settings = configured.for_adapter(adapter, scoring.settings_from)
    return compare_captions(
        base_model, adapter, images, image_features, test_conversations, settings, workspace.path, launcher
    )


def score_captions(predictions: Table, scoring: ScoringParameters) -> tuple[dict[str, Any], Table]:
    """BLEU, ROUGE-L and CIDEr of both sides, over the split and for each picture."""
    from qwen_vl_lora.scoring.metrics import score_predictions

    return score_predictions(predictions, scoring)


def build_report(
    predictions: Table,
    caption_metrics: dict[str, Any],
    caption_scores: Table,
    images: ImageStore,
    adapter: Adapter,
) -> tuple[str, Any, Any]:
    """The before/after page, a contact sheet of it, and the metrics as a plot."""
    from qwen_vl_lora.scoring.facts import facts_of
    from qwen_vl_lora.scoring.report import ReportRun, render_report
    from qwen_vl_lora.scoring.sheets import draw_comparison_sheet, plot_metrics

    def open_image(path: str) -> Any:
        return images.open(images.by_path(path).sha256)

    run = ReportRun(facts_of(adapter, caption_metrics["num_images"]), predictions, caption_scores, caption_metrics)
    page = render_report([run], open_image)
    return page, draw_comparison_sheet(predictions, caption_scores, open_image), plot_metrics(caption_metrics)
