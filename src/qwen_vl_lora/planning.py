"""What a plan is made of, from the catalog: base, data and throughput, as far as they are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.io import CatalogProtocol

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.lineage.records import read_records, runs_folder
from qwen_vl_lora.modeling.geometry import PUBLISHED, Geometry
from qwen_vl_lora.modeling.stand_in import StandInProcessor
from qwen_vl_lora.parameters import CaptionsParameters, Parameters
from qwen_vl_lora.samples.collection import AddressSource, RemoteSource
from qwen_vl_lora.samples.outlook import look_ahead, typical_captions
from qwen_vl_lora.samples.records import FileSource
from qwen_vl_lora.samples.splitting import choose_sides
from qwen_vl_lora.tuning.plan import PlannedBase, PlannedData, Speed

_SIDE_FILES = 12 * 10**6
"""Bytes of tokenizer and configuration files beside the weights of a published checkpoint."""


def find_base(catalog: CatalogProtocol) -> PlannedBase:
    """The base by its own files where they are here, else by its published sizes. Nothing is downloaded.

    Raises:
        MissingArtifactError: if it is neither here nor known.
    """
    dataset: Any = catalog["base_model"]
    name = str(dataset._describe()["model"])
    if dataset.exists():
        base = dataset.load()
        return PlannedBase(name, Geometry.of_config(base.config), base.load_processor(), is_here=True, download_bytes=0)
    repository = parse_repository("model", name)
    if repository is None:
        dataset.check()
    geometry = PUBLISHED.get(repository.id) if repository else None
    if geometry is None:
        raise MissingArtifactError(
            f"Base model {name} is not on this machine, and its sizes are known of {', '.join(PUBLISHED)} only. "
            "Any run that computes fetches it; plan after that, or give a folder: base_model=path."
        )
    size = 2 * geometry.parameters + _SIDE_FILES
    return PlannedBase(name, geometry, StandInProcessor(geometry), is_here=False, download_bytes=size)


def find_data(context: KedroContext, parameters: Parameters, *, from_source: bool) -> PlannedData:
    """What would be trained on: the newest data run's conversations, else the source itself.

    Raises:
        DataFormatError: if neither is here, or the source gives too little.
    """
    catalog = context.catalog
    if not from_source and catalog["train_conversations"].exists():  # type: ignore[attr-defined]
        return _stored_data(context, parameters)
    source = catalog["captioned_images"].load()
    if parameters.image.allow_urls and isinstance(source, AddressSource):
        source = source.with_addresses()
    captions, origin = parameters.captions, f"{source if isinstance(source, FileSource) else 'the source'}, read now"
    if isinstance(source, RemoteSource):
        source, origin = typical_captions(), "the source is on the network and was not asked: captions of 11 words"
        captions = _bounded(captions)
    ahead = look_ahead(source, captions, parameters.image, parameters.prompt)
    shas = [[_sha(path) for path in _paths(record)] for record in ahead.conversations]
    sides = choose_sides(shas, parameters.split)
    by_side: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for record, pictures in zip(ahead.conversations, shas, strict=True):
        by_side[sides[pictures[0]] if pictures else "train"].append(record)
    return PlannedData(**by_side, images=ahead.images, origin=origin, rejected=ahead.rejected)


def _bounded(captions: CaptionsParameters) -> CaptionsParameters:
    if captions.num_rows is None:
        raise DataFormatError(
            "The source is on the network and captions.num_rows is null, so the number of samples is unknown. "
            "Give captions.num_rows, or run data_engineering first: kedro run --pipeline data_engineering."
        )
    return captions.model_copy(update={"sampling": "first"})  # the stand-in for a source has no end


def _stored_data(context: KedroContext, parameters: Parameters) -> PlannedData:
    from kedro.framework.project import pipelines

    from qwen_vl_lora.recording import pin_free_inputs

    catalog: Any = context.catalog
    recipe = parameters.recipe or context.config_loader["globals"]["recipe"]
    records = read_records(runs_folder(Path(context.project_path), recipe))
    versions = pin_free_inputs(pipelines["training"], catalog, records)
    version = versions["train_conversations"]
    test = catalog["test_conversations"]
    if version in test.versions():
        test.pin(version)
    return PlannedData(
        train=catalog["train_conversations"].load(),
        validation=catalog["validation_conversations"].load(),
        test=test.load() if test.exists() else [],
        images=catalog["images"].load(),
        origin=f"train_conversations {version}",
        rejected=len(catalog["rejected_samples"].load()) if catalog["rejected_samples"].exists() else 0,
    )


def find_speed(catalog: CatalogProtocol, stated: float | None) -> Speed | None:
    """The stated throughput, else that of the newest training of this recipe, else None."""
    if stated is not None:
        return Speed(stated, "stated")
    summaries: Any = catalog["training_summary"]
    if not summaries.exists():
        return None
    summary = summaries.load()
    version = summaries.resolve_load_version()
    return Speed(summary["samples_per_second"], f"measured by training {version} on {summary['device']}")


def _paths(record: dict[str, Any]) -> tuple[str, ...]:
    from qwen_vl_lora.samples.conversations import parse_conversation

    return parse_conversation(record).image_paths


def _sha(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]
