"""Node of the inference pipeline. torch comes in when it runs, not when pipelines are listed."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.modeling.adapter import Adapter
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.parameters import (
    GenerationParameters,
    ImageParameters,
    InferenceParameters,
    LauncherParameters,
    PromptParameters,
    TrainingParameters,
)
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples.named_pictures import gather_pictures
from qwen_vl_lora.samples.statistics import draw_sheet
from qwen_vl_lora.samples.workspace import Workspace


def caption_pictures(
    base_model: BaseModel,
    adapter: Adapter,
    workspace: Workspace,
    inference: InferenceParameters,
    prompt: PromptParameters,
    image: ImageParameters,
    generation: GenerationParameters,
    training_args: TrainingParameters,
    vision: str,
    device: str,
    launcher: LauncherParameters,
    quantization: str | None,
) -> tuple[Table, Image.Image]:
    """Caption the pictures that `inference.images` names."""
    if inference.images is None:
        raise ParameterError(
            "inference.images names no pictures. Give a folder, a picture, or a CSV with the column image_path: "
            'kedro run --pipeline inference --params "inference.images=path/to/folder".'
        )
    gathered = gather_pictures([Path(inference.images).expanduser()], image, recursive=inference.recursive)
    from qwen_vl_lora.scoring.inference import Captioner, CaptionNotes, caption_gathered
    from qwen_vl_lora.scoring.settings import CaptionSettings

    dtype = training_args.dtype
    configured = CaptionSettings(prompt, image, generation, vision, dtype, device, quantization)  # type: ignore[arg-type]
    captioner = Captioner(base_model, adapter, configured.for_adapter(adapter, inference.settings_from))
    notes = CaptionNotes(workspace.folder("inference") / f"{captioner.key}.jsonl")
    captions = caption_gathered(captioner, gathered, notes, workspace.path, launcher)
    return captions, draw_sheet({name: notes.captions[name] for name in gathered.usable}, gathered.images)
