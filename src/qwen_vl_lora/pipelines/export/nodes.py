"""Node of the export pipeline. torch comes in when it runs, not when pipelines are listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.parameters import ImageParameters, Parameters
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def merge_adapter(
    base_model: BaseModel,
    adapter: Adapter,
    images: ImageStore,
    test_conversations: Sequence[dict[str, Any]],
    caption_metrics: dict[str, Any],
    workspace: Workspace,
    settings: Parameters,
) -> Path:
    """Write base + adapter as one model with its card, checked against base + adapter on held-out conversations."""
    from qwen_vl_lora.evaluation.probing import LogitsProbe
    from qwen_vl_lora.model import merging
    from qwen_vl_lora.model.model_card import model_card
    from qwen_vl_lora.pages.language import choose_language
    from qwen_vl_lora.samples.conversations import Conversations

    record = adapter.record
    image = ImageParameters.model_validate(record["image"])
    adapter.check_base(base_model)
    probe = LogitsProbe.on(base_model, images, Conversations(test_conversations), image)
    directory = workspace.folder("export") / "merged_model"
    check = merging.merge_adapter(
        base_model, adapter, directory, settings.export, choose_device(settings.device), probe
    )
    answers = (conversation["conversations"][-1]["value"] for conversation in test_conversations)
    language = choose_language(settings.report.language, answers)
    card = model_card(base_model, record, caption_metrics, check, language)
    (directory / "README.md").write_text(card, encoding="utf-8")
    return directory
