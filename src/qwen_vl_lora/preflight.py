"""Whether a run can succeed at all, looked at before its first node: cheap, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.hub.addresses import address_of_path
from qwen_vl_lora.modeling.devices import check_attention, choose_device
from qwen_vl_lora.modeling.parent import find_parent
from qwen_vl_lora.modeling.quantization import check_quantization
from qwen_vl_lora.parameters import CaptionsParameters, QuarantineParameters
from qwen_vl_lora.samples.records import FileSource, Rejection, SourceSample

SOURCE = "captioned_images"


def check_run(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Refuse a run whose inputs or device are not there.

    Raises:
        QwenVLLoraError: naming what is missing and what to do.
    """
    inputs = pipeline.inputs()
    for name in sorted(inputs):
        if not name.startswith("params:") and name != "parameters":
            _check_input(name, catalog.get(name))
    if SOURCE in inputs:
        _check_source(catalog)
    if pipeline.only_nodes_with_tags("compute").nodes:
        _check_computing(catalog)
    parent = catalog["params:init_adapter"].load() if "params:init_adapter" in inputs else None
    if parent is not None:
        find_parent(parent, catalog["workspace"].load().path)


def _check_computing(catalog: CatalogProtocol) -> None:
    if catalog["params:device"].load() == "cuda":
        choose_device("cuda")
    check_attention(catalog["params:attention"].load())
    check_quantization(catalog["params:quantization"].load())


def _check_input(name: str, dataset: Any) -> None:
    look = getattr(dataset, "check", None) or getattr(dataset, "existing_path", None)
    if look is None:
        return
    try:
        look()
    except MissingArtifactError as error:
        raise MissingArtifactError(f"Dataset {name}: {error}") from error


def _check_source(catalog: CatalogProtocol) -> None:
    rows = catalog[SOURCE].load()
    if catalog["params:image"].load().allow_urls:
        from qwen_vl_lora.samples.collection import AddressSource

        rows = rows.with_addresses() if isinstance(rows, AddressSource) else rows
    check_files(rows, catalog["params:captions"].load(), catalog["params:quarantine"].load())


def check_files(rows: Any, captions: CaptionsParameters, quarantine: QuarantineParameters) -> None:
    """Refuse a file of captions that is empty, or most of whose pictures are not there.

    Only looks whether files exist: what is in them is checked when they are collected.

    Raises:
        DataFormatError: with how many rows are bad and the first of them.
    """
    if not isinstance(rows, FileSource):
        return
    from qwen_vl_lora.samples.collection import take_rows  # brings pandas, which listing pipelines need not wait for

    num_rows, faults = 0, []
    for row in take_rows(rows, captions):
        num_rows += 1
        fault = _fault(row)
        if fault is not None:
            faults.append(fault)
    if num_rows == 0:
        raise DataFormatError(
            f"The source `{SOURCE}` ({rows}) holds no rows. Give a file with at least one caption, and check "
            "captions.num_rows."
        )
    if len(faults) > quarantine.max_share * num_rows:
        shown = "\n".join(f"  {fault}" for fault in faults[:5])
        raise DataFormatError(
            f"{len(faults)} of {num_rows} rows of `{SOURCE}` ({rows}) cannot be used; quarantine.max_share allows "
            f"{quarantine.max_share:.0%}. The first:\n{shown}\nMend the file or its pictures' paths (they are relative "
            "to the file), or raise quarantine.max_share."
        )


def _fault(row: SourceSample | Rejection) -> str | None:
    if isinstance(row, Rejection):
        return f"row {row.row}: {row.reason}: {row.detail}"
    files = [image for image in row.images if isinstance(image, Path) and address_of_path(str(image)) is None]
    # Not Path.is_file, which raises for a name that is too long: the row is bad, not the run.
    lost = [file for file in files if not os.path.isfile(file)]  # noqa: PTH113
    return f"row {row.row}: missing_image: {lost[0]} is not there" if lost else None
