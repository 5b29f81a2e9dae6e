"""Node of the inference pipeline. torch comes in when it runs, not when pipelines are listed."""

from __future__ import annotations

from PIL import Image

# Kedro resolves these annotations to validate parameters: none may move under TYPE_CHECKING.
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.pipelines.tables import Table
from qwen_vl_lora.samples.named_pictures import gather_pictures, named_place
from qwen_vl_lora.samples.statistics import draw_sheet
from qwen_vl_lora.samples.workspace import Workspace


def caption_pictures(
    base_model: BaseModel,
    adapter: Adapter | None,
    workspace: Workspace,
    settings: Parameters,
) -> tuple[Table, Image.Image]:
    """Caption the pictures that `inference.images` names."""
    inference = settings.inference
    place = named_place(inference.images)
    gathered = gather_pictures([place], settings.image, recursive=inference.recursive)
    from qwen_vl_lora.evaluation.inference import caption_gathered, choose_captioner
    from qwen_vl_lora.evaluation.kept_captions import KeptCaptions
    from qwen_vl_lora.evaluation.outputs import Outputs
    from qwen_vl_lora.evaluation.settings import settings_for

    if adapter is not None:
        settings = settings_for(adapter, settings, inference.settings_from, asks=True)
    captioner = choose_captioner(base_model, adapter, settings)
    kept = KeptCaptions(workspace.folder("inference"), captioner.key, gathered.usable)
    outputs = Outputs(inference.output, place, gathered.named)
    captions = caption_gathered(captioner, gathered, kept, outputs.left_out(kept.captions))
    outputs.write(kept.captions)
    return captions, draw_sheet({name: caption.text for name, caption in kept.captions.items()}, gathered.images)
