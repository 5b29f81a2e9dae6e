"""Nodes of the evaluation pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.runs.records import is_replay
from qwen_vl_lora.runs.run import current_run
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def generate_captions(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    image_features: FeatureStore,
    test_conversations: Sequence[dict[str, Any]],
    workspace: Workspace,
    settings: Parameters,
) -> Table:
    """Caption the held-out pictures with the base and the tuned model, everything else equal."""
    from qwen_vl_lora.evaluation.comparison import compare_captions
    from qwen_vl_lora.evaluation.contenders import find_contenders
    from qwen_vl_lora.evaluation.kept_captions import FOLDER
    from qwen_vl_lora.evaluation.settings import settings_for
    from qwen_vl_lora.samples.conversations import Conversations

    conversations = Conversations(test_conversations)
    settings_from = settings.scoring.settings_from
    settings = settings_for(adapter, settings, settings_from, asks=False)
    if settings_from == "parameters":
        adapter.check_asked(conversations)
    folder = None if is_replay(current_run(), workspace.project) else workspace.folder(FOLDER)
    contenders = find_contenders(settings.evaluation.contenders, base_model, workspace, settings)
    return compare_captions(base_model, adapter, images, image_features, conversations, settings, folder, contenders)


def score_captions(
    predictions: Table, images: ImageStore, workspace: Workspace, settings: Parameters
) -> tuple[dict[str, Any], Table]:
    """BLEU, ROUGE-L and CIDEr of all sides, over the split and for each picture; a judge's verdicts and CLIPScore."""
    from qwen_vl_lora.evaluation.scoring import score_table

    return score_table(predictions, images, workspace.project, settings)


def build_report(
    predictions: Table,
    caption_metrics: dict[str, Any],
    caption_scores: Table,
    images: ImageStore,
    adapter: Adapter,
    caption_statistics: dict[str, Any],
    settings: Parameters,
) -> tuple[str, Any, Any]:
    """The before/after page, a contact sheet of it, and the metrics as a plot."""
    from qwen_vl_lora.evaluation.facts import facts_of
    from qwen_vl_lora.evaluation.predictions import language_of_references
    from qwen_vl_lora.evaluation.report import ReportRun, headline, render_report
    from qwen_vl_lora.evaluation.sheets import draw_comparison_sheet, plot_metrics, sheet_language

    def open_image(path: str) -> Any:
        return images.open(images.by_path(path).sha256)

    language = language_of_references(settings.report.language, predictions)
    facts = facts_of(adapter, caption_metrics["num_images"], caption_statistics, language)
    facts = replace(facts, contenders={one.name: one.place for one in settings.evaluation.contenders})
    run = ReportRun(facts, predictions, caption_scores, caption_metrics)
    page, of_sheet = render_report([run], open_image, language), sheet_language(language)
    title = f"{facts.name} {facts.created}: {headline(run, language=of_sheet)}"
    sheet = draw_comparison_sheet(predictions, caption_scores, open_image, title, of_sheet)
    return page, sheet, plot_metrics(caption_metrics)
