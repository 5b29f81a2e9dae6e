"""`encode_images`, the one node that training and evaluation have in common."""

from __future__ import annotations

from kedro.pipeline import Node

from qwen_vl_lora.features.store import FeatureStore, StagedShards
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.devices import choose_device, usable_dtype
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.pipelines.described import described_node
from qwen_vl_lora.samples.image_store import ImageStore
from qwen_vl_lora.samples.workspace import Workspace


def encode_images(
    images: ImageStore,
    base_model: BaseModel,
    workspace: Workspace,
    settings: Parameters,
) -> StagedShards:
    """Run the frozen vision tower once per distinct picture that is not stored yet."""
    if settings.vision == "adapted":
        return StagedShards(key=None, paths=())
    from qwen_vl_lora.features.encoding import encode_pictures

    device = choose_device(settings.device)
    dtype = usable_dtype(settings.training_args.dtype, device)
    store, staging = FeatureStore(workspace.feature_store), workspace.folder("features")
    return encode_pictures(images, base_model, settings.image, dtype, device, store, staging, settings.cluster)


def encode_images_node() -> Node:
    """A new node each time: pipelines may not share one instance, but equal nodes are merged."""
    return described_node(
        encode_images,
        inputs=["images", "base_model", "workspace", "params:settings"],
        outputs="image_features",
        tags=["compute"],
    )
