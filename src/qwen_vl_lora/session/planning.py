"""Inputs of a plan, read from the catalog: base model, data and throughput, as far as they are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.io import CatalogProtocol

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, ParameterError
from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.model.families import FAMILIES, family_of_published
from qwen_vl_lora.model.stand_in import StandInProcessor, processor_of_files
from qwen_vl_lora.parameters import CaptionsParameters, Parameters
from qwen_vl_lora.runs.records import read_records, runs_folder
from qwen_vl_lora.samples.conversations import Conversation, Conversations
from qwen_vl_lora.samples.outlook import look_ahead, typical_captions
from qwen_vl_lora.samples.source import Source, as_source
from qwen_vl_lora.samples.splitting import deal
from qwen_vl_lora.training.plan import PlannedBase, PlannedData, Speed
from qwen_vl_lora.training.stages import Pace

_SIDE_FILES = 12 * 10**6
"""Bytes of tokenizer and configuration files beside the weights of a published checkpoint."""


def find_base(catalog: CatalogProtocol) -> PlannedBase:
    """Describe the base from its files if they are on this machine, else from published sizes. Downloads nothing.

    Raises:
        MissingArtifactError: if it is neither on this machine nor a published model.
    """
    dataset: Any = catalog["base_model"]
    name = str(dataset._describe()["model"])
    if dataset.exists():
        base = dataset.load()
        processor = processor_of_files(base.path, base.family) or base.load_processor()
        return PlannedBase(name, base.family, base.geometry, processor, is_here=True, download_bytes=0)
    repository = parse_repository("model", name)
    if repository is None:
        dataset.check()
    family = family_of_published(repository.id) if repository else None
    if repository is None or family is None:
        known = ", ".join(name for family in FAMILIES for name in family.published)
        raise MissingArtifactError(
            f"Base model {name} is not on this machine, and sizes are known only for {known}. "
            "Start a run that needs the base, which downloads it, then plan; or give a folder: base_model=path."
        )
    geometry = family.published_geometry(repository.id)
    size = 2 * (geometry.parameters + geometry.unloaded) + _SIDE_FILES
    return PlannedBase(name, family, geometry, StandInProcessor(family), is_here=False, download_bytes=size)


def find_data(context: KedroContext, parameters: Parameters, *, from_source: bool) -> PlannedData:
    """Return the data to train on: conversations of the newest data_engineering run, else the source.

    Raises:
        DataFormatError: if neither is found, or the source gives too little.
        ParameterError: if the stored data were made with other parameters than those of the plan.
    """
    catalog = context.catalog
    if not from_source and catalog["train_conversations"].exists():  # type: ignore[attr-defined]
        return _stored_data(context, parameters)
    source: Source = as_source(catalog["captioned_images"].load())
    captions, origin = parameters.captions, f"{source}, read now"
    if not source.is_local:
        source, origin = typical_captions(), "the source is on the network, not read: assumes captions of 11 words"
        captions = _bounded(captions)
    ahead = look_ahead(source, captions, parameters.image, parameters.prompt, Path(context.project_path))
    conversations = Conversations(ahead.conversations)
    shas = [[_sha(path) for path in conversation.image_paths] for conversation in conversations]
    sides = deal(shas, [record.get("split") for record in ahead.conversations], parameters.split)
    by_side: dict[str, list[Conversation]] = {"train": [], "validation": [], "test": []}
    for conversation, side in zip(conversations, sides, strict=True):
        by_side[side].append(conversation)
    return PlannedData(**by_side, images=ahead.images, origin=origin, rejected=ahead.rejected)


def _bounded(captions: CaptionsParameters) -> CaptionsParameters:
    if captions.num_rows is None:
        raise DataFormatError(
            "The source is on the network and captions.num_rows is null, so the number of samples is unknown. "
            "Give captions.num_rows, or run data_engineering first: kedro run --pipeline data_engineering."
        )
    return captions.model_copy(update={"sampling": "first", "exclude": None})  # the stand-in source is endless


def _stored_data(context: KedroContext, parameters: Parameters) -> PlannedData:
    from kedro.framework.project import pipelines

    from qwen_vl_lora.session.recording import pin_free_inputs
    from qwen_vl_lora.session.stored_data import Stated, check_stored_data

    catalog: Any = context.catalog
    recipe = parameters.recipe or context.config_loader["globals"]["recipe"]
    records = read_records(runs_folder(Path(context.project_path), recipe))
    versions = pin_free_inputs(pipelines["training"], catalog, records)
    tree = context.config_loader["parameters"]
    stated = Stated.of_run(catalog, tree, context.config_loader.runtime_params)
    try:
        check_stored_data(pipelines["training"], catalog, versions, records, stated, context.env)
    except ParameterError as error:
        raise ParameterError(f"{error}\nTo plan from the source instead: --from-source.") from error
    version = versions["train_conversations"]
    test = catalog["test_conversations"]
    if version in test.versions():
        test.pin(version)
    return PlannedData(
        train=Conversations(catalog["train_conversations"].load()),
        validation=Conversations(catalog["validation_conversations"].load()),
        test=Conversations(test.load()) if test.exists() else [],
        images=catalog["images"].load(),
        origin=f"train_conversations {version}",
        rejected=len(catalog["rejected_samples"].load()) if catalog["rejected_samples"].exists() else 0,
    )


def find_speed(catalog: CatalogProtocol, stated: float | None) -> Speed | None:
    """Return the given throughput, else that of the newest training of this recipe, else None."""
    if stated is not None:
        return Speed(stated, "stated")
    summaries: Any = catalog["training_summary"]
    if not summaries.exists():
        return None
    summary = summaries.load()
    version = summaries.resolve_load_version()
    source = f"measured by training {version} on {summary['device']}"
    return Speed(summary["samples_per_second"], source, summary.get("ranks", 1))


def find_paces(context: KedroContext, parameters: Parameters) -> dict[str, Pace]:
    """Return the newest measured speed of each node, by this recipe's runs with this base and picture size.

    The base does not matter to `collect_samples`.
    """
    recipe = parameters.recipe or context.config_loader["globals"]["recipe"]
    base: Any = context.catalog["base_model"]
    wanted = {"base": str(base._describe()["model"]), **parameters.image.size}
    paces: dict[str, Pace] = {}
    for record in reversed(read_records(runs_folder(Path(context.project_path), recipe))):
        theirs = {
            "base": (record.facts.get("base_model") or {}).get("name"),
            **record.facts.get("parameters", {}).get("image", {}),
        }
        is_alike = all(theirs.get(name) == value for name, value in wanted.items())
        for node, work in record.facts.get("work", {}).items():
            if work["per_second"] and (is_alike or node == "collect_samples"):
                source = f"measured by run {record.id} on {record.facts.get('device') or 'cpu'}"
                paces.setdefault(node, Pace(work["per_second"] / len(work["processes"]), source))
    return paces


def _sha(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]
