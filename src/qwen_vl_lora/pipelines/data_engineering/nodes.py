"""Nodes of the `data_engineering` pipeline. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.parameters import Parameters, PromptParameters, SplitParameters
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples import collection, data_page, splitting, statistics
from qwen_vl_lora.samples import conversations as conversation_form
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.records import Row
from qwen_vl_lora.samples.workspace import Workspace


def collect_samples(
    captioned_images: Iterable[Row], workspace: Workspace, settings: Parameters
) -> collection.Collected:
    """Check every row and picture of the source; bad rows go to quarantine with their reason."""
    return collection.collect(
        captioned_images,
        workspace,
        settings.captions,
        settings.image,
        settings.quarantine,
        cluster=settings.cluster,
    )


def build_conversations(
    samples: Sequence[dict[str, Any]], images: ImageStore, prompt: PromptParameters
) -> Iterable[dict[str, Any]]:
    """Write samples in the tutorials' JSON form, with the prompt where they have none of their own."""
    return conversation_form.ConversationsOf(samples, images, prompt)


def split_conversations(
    conversations: Sequence[dict[str, Any]], images: ImageStore, split: SplitParameters
) -> splitting.Split:
    """Hold out images, by their bytes, with all their conversations."""
    return splitting.split_conversations(conversations, images, split)


def describe_captions(
    samples: Sequence[dict[str, Any]], images: ImageStore, collection_summary: dict[str, Any]
) -> statistics.Description:
    """Count, plot and show captions and pictures, and what was left out."""
    return statistics.describe_captions(samples, images, collection_summary)


def build_data_page(
    samples: Sequence[dict[str, Any]],
    images: ImageStore,
    rejected_samples: Table,
    rejected_pictures: Sequence[dict[str, Any]],
    caption_statistics: dict[str, Any],
    split_summary: dict[str, Any],
    settings: Parameters,
) -> str:
    """Show rejected, suspicious, doubled and long rows with their pictures, and what is left to train on."""
    summary = caption_statistics["collection"]
    language = data_page.language_of_samples(settings.report.language, samples)
    found = data_page.find_all(
        samples, images, rejected_samples, rejected_pictures, summary, split_summary, settings, language
    )
    return data_page.render_data_page(found, samples, caption_statistics, split_summary, settings, language)
