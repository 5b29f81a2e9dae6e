"""This project's side: the Kedro nodes themselves, given by name what the catalog would give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy  # noqa: F401 -- with pandas, imported before the clock starts, as on the other side
import pandas  # noqa: F401

from benchmarks.jobs import Job, write_json
from qwen_vl_lora.datasets.tables import SpreadsheetCSVDataset
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.pipelines.data_engineering import nodes as data_engineering
from qwen_vl_lora.pipelines.encoding import encode_images
from qwen_vl_lora.pipelines.evaluation.nodes import generate_captions
from qwen_vl_lora.pipelines.training.nodes import train_adapter
from qwen_vl_lora.samples.image_store import ImageStore, publish_files, read_manifest, write_manifest
from qwen_vl_lora.samples.record_files import open_records, write_records
from qwen_vl_lora.samples.sources import CaptionsFile
from qwen_vl_lora.samples.workspace import Workspace

FIRST_LOSS_SAMPLES = 16
"""As in `tutorial`, which this module cannot import: it would bring torch into the memory of data engineering."""


def call_node(node: Callable[..., Any], parameters: Parameters, **datasets: Any) -> Any:
    """Call a node with what its arguments name: datasets first, else a block of the parameters."""
    given = {"settings": parameters, **datasets}
    names = inspect.signature(node).parameters
    return node(**{name: given[name] if name in given else getattr(parameters, name) for name in names})


def open_images(data: Path, split: str) -> ImageStore:
    """The pictures of one split, as the catalog's `images` entry would load them."""
    return read_manifest(data / split / "manifest.csv", workspace_in(data, split).images)


def save_images(images: ImageStore, manifest: Path) -> ImageStore:
    """Publish staged pictures and their manifest, as the catalog's `images` entry does, and load them again."""
    publish_files(images, images.published)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(images, manifest)
    return read_manifest(manifest, images.published)


def encode(job: Job, images: ImageStore, workspace: Workspace) -> FeatureStore:
    """The `encode_images` node and its dataset's save."""
    parameters = Parameters.model_validate(job.parameters)
    base_model = BaseModel(name="base", path=job.base_path)
    staged = call_node(encode_images, parameters, images=images, base_model=base_model, workspace=workspace)
    store = FeatureStore(workspace.feature_store)
    store.publish(staged)
    return store


def open_workspace(job: Job) -> Workspace:
    """A workspace in the job's own folder, empty before the job."""
    workspace = workspace_in(job.scratch, "bench")
    workspace.path.mkdir(parents=True, exist_ok=True)
    return workspace


def workspace_in(project: Path, recipe: str) -> Workspace:
    """A recipe's workspace and places below a folder, as the project's own catalog lays them out."""
    data = project / "data"
    return Workspace(
        path=data / "09_workspace" / recipe,
        project=project,
        images=data / "02_intermediate" / recipe / "images" / "files",
        feature_store=data / "04_feature" / recipe / "image_features",
        adapters=data / "06_models" / recipe / "adapter",
    )


def train(job: Job) -> dict[str, Any]:
    """`encode_images` and `train_adapter`, from the JSON of conversations to the adapter's directory.

    Returns:
        `train_s`, `steps`, `adapter` as on the other side, and the node's `summary`.
    """
    workspace, images = open_workspace(job), open_images(job.data, "train")
    directory, _, summary, *_ = call_node(
        train_adapter,
        Parameters.model_validate(job.parameters),
        base_model=BaseModel(name="base", path=job.base_path),
        images=images,
        image_features=encode(job, images, workspace),
        train_conversations=job.conversations("train"),
        validation_conversations=[],
        workspace=workspace,
    )
    told = {"train_s": summary["seconds"], "steps": summary["steps"], "adapter": str(directory)}
    return {**told, "summary": summary}


def caption(job: Job) -> dict[str, Any]:
    """`encode_images` and `generate_captions`."""
    workspace, images = open_workspace(job), open_images(job.data, "test")
    table = call_node(
        generate_captions,
        Parameters.model_validate(job.parameters),
        base_model=BaseModel(name="base", path=job.base_path),
        adapter=Adapter(Path(job.options["adapter"])),
        images=images,
        image_features=encode(job, images, workspace),
        test_conversations=job.conversations("test"),
        workspace=workspace,
    )
    return {"base_captions": table["base_caption"].tolist(), "tuned_captions": table["tuned_caption"].tolist()}


def engineer(job: Job) -> dict[str, Any]:
    """`collect_samples`, `build_conversations` and `split_conversations`, with everything they save.

    As in a Kedro run, what a node gave is saved and let go, and the next one loads it.
    """
    parameters = Parameters.model_validate(job.parameters)
    files = {name: job.scratch / f"{name}.json" for name in ("samples", "conversations", "train", "validation", "test")}
    manifest = job.scratch / "manifest" / "manifest.csv"
    published = _collect(job, parameters, manifest, files["samples"])
    images = read_manifest(manifest, published)
    conversations = call_node(
        data_engineering.build_conversations, parameters, samples=open_records(files["samples"]), images=images
    )
    write_records(conversations, files["conversations"])
    del conversations, images
    images = read_manifest(manifest, published)
    *parts, summary = call_node(
        data_engineering.split_conversations,
        parameters,
        conversations=open_records(files["conversations"]),
        images=images,
    )
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        write_records(part, files[name])
    write_json(job.scratch / "split_summary.json", summary)
    return {"images": len(images)}


def _collect(job: Job, parameters: Parameters, manifest: Path, samples_file: Path) -> Path:
    """The first node and its saves; gives the folder of the published bytes."""
    staged, samples, table, rejected, pictures, summary = call_node(
        data_engineering.collect_samples,
        parameters,
        captioned_images=CaptionsFile(job.data / "captions.csv"),
        workspace=open_workspace(job),
    )
    save_images(staged, manifest)
    write_records(samples, samples_file)
    SpreadsheetCSVDataset(filepath=(job.scratch / "caption_table.csv").as_posix()).save(table)
    rejected.to_csv(job.scratch / "rejected_samples.csv", index=False)
    write_json(job.scratch / "rejected_pictures.json", pictures)
    write_json(job.scratch / "collection_summary.json", summary)
    return staged.published


def check(job: Job) -> dict[str, Any]:
    """What must be equal on both sides: tokens and image tokens of the whole training set, and the untrained loss."""
    encoded = encode_conversations(job)
    return {
        # Without the line break behind the answer, which the other side does not have.
        "tokens": sum(int(item.scored.nonzero()[0][-1]) + 1 for item in encoded),
        "image_tokens": sum(int(item.is_image.sum()) for item in encoded),
        "scored_tokens": sum(int(item.scored.sum()) for item in encoded),
        "first_loss": untrained_loss(job, encoded[:FIRST_LOSS_SAMPLES]),
    }


def encode_conversations(job: Job) -> list[Any]:
    """The training set in tokens."""
    from qwen_vl_lora.samples.conversations import Conversations

    encoder = _encoder(job)
    return [encoder.encode(conversation) for conversation in Conversations(job.conversations("train"))]


def untrained_loss(job: Job, encoded: Sequence[Any]) -> float:
    """Mean loss over all answer tokens, the way training computes it: stored features, shared rows, answers only."""
    import torch
    from accelerate.utils import send_to_device
    from torch.nn import functional

    from qwen_vl_lora.features.inputs import choose_pictures
    from qwen_vl_lora.training.collator import RowCollator
    from qwen_vl_lora.training.rows import plan_passes

    parameters, base_model = Parameters.model_validate(job.parameters), BaseModel(name="base", path=job.base_path)
    encoder, dtype = _encoder(job), parameters.training_args.dtype
    store = FeatureStore(open_workspace(job).feature_store)
    collate = RowCollator(encoder, choose_pictures(parameters.vision, base_model, encoder, store, dtype))
    model = base_model.load_model(dtype, parameters.device)
    total, tokens = 0.0, 0
    for rows in plan_passes(encoded, parameters.rows, 4):
        forward = collate(rows)
        with torch.no_grad():
            logits = model(**send_to_device(forward.inputs, model.device), use_cache=False).logits.cpu()
        scored = logits[forward.source[0], forward.source[1]].float()
        total += float(functional.cross_entropy(scored, forward.labels, reduction="sum"))
        tokens += len(forward.labels)
    return total / tokens


def _encoder(job: Job) -> Any:
    from qwen_vl_lora.model.chat import ChatEncoder

    processor = BaseModel(name="base", path=job.base_path).load_processor()
    return ChatEncoder(processor, Parameters.model_validate(job.parameters).image, open_images(job.data, "train"))
