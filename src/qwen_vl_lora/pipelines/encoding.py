"""`encode_images`, the one node that training and evaluation have in common."""

from __future__ import annotations

from kedro.pipeline import Node

from qwen_vl_lora.features.store import FeatureStore, StagedShards
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.devices import choose_device, usable_dtype
from qwen_vl_lora.parameters import ImageParameters, LauncherParameters, TrainingParameters
from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def encode_images(
    images: ImageStore,
    base_model: BaseModel,
    workspace: Workspace,
    image: ImageParameters,
    training_args: TrainingParameters,
    vision: str,
    device: str,
    launcher: LauncherParameters,
) -> StagedShards:
    """Run the frozen vision tower once per distinct picture that is not stored yet."""
    if vision == "adapted":
        return StagedShards(key=None, paths=())
    from qwen_vl_lora.features.encoding import encode_pictures

    chosen = choose_device(device)
    return encode_pictures(
        images=images,
        base_model=base_model,
        image=image,
        dtype=usable_dtype(training_args.dtype, chosen),
        device=chosen,
        store=FeatureStore(workspace.feature_store),
        staging=workspace.folder("features"),
        launcher=launcher,
    )


def encode_images_node() -> Node:
    """A new node each time: pipelines may not share one instance, but equal nodes are merged."""
    return described_node(
        encode_images,
        inputs=[
            "images",
            "base_model",
            "workspace",
            "params:image",
            "params:training_args",
            "params:vision",
            "params:device",
            "params:launcher",
        ],
        outputs="image_features",
        tags=["compute"],
    )
