"""Checks that stored data were made with the parameters of the run that reads them.

A run records its own parameters. If it read data that an earlier run made with other parameters, its record would be
wrong, so such a run is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from pydantic import ValidationError

from qwen_vl_lora.datasets.sources import expand_home
from qwen_vl_lora.exceptions import DataFormatError, ParameterError
from qwen_vl_lora.parameters import PromptParameters
from qwen_vl_lora.runs.comparison import flatten
from qwen_vl_lora.runs.consistency import versions_behind
from qwen_vl_lora.runs.masking import mask_tree
from qwen_vl_lora.runs.records import Record
from qwen_vl_lora.samples.conversations import ask_alike

SOURCE = "captioned_images"
_COLLECTING = (
    SOURCE,
    "captions",
    "image.max_source_pixels",
    "image.max_aspect_ratio",
    "image.storage",
    "image.allowed_roots",
    "image.more_formats",
    "image.allow_urls",
    "image.url_hosts",
    "image.url_max_bytes",
    "quarantine",
)
DECIDED_BY: Mapping[str, tuple[str, ...]] = {
    "images": _COLLECTING,
    "samples": _COLLECTING,
    "conversations": ("prompt",),
    "train_conversations": ("split",),
    "validation_conversations": ("split",),
    "test_conversations": ("split",),
}
"""Dataset → what the node that writes it reads besides datasets: groups of parameters, single ones, and the source.

The image size is not among them, because pictures are stored unchanged. Neither is `image.url_timeout`, because a
repeated fetch can succeed with the same value.
"""

_FILE = "captions_file"


@dataclass(frozen=True)
class Difference:
    """A parameter whose value in this run differs from that of the stored data."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.then} → {self.now}"


@dataclass(frozen=True)
class Stated:
    """What a run states about its data.

    Attributes:
        parameters: the resolved tree.
        runtime_params: the part that the command line gave.
        source: description of `captioned_images`; empty where it names no file.
    """

    parameters: Mapping[str, Any]
    runtime_params: Mapping[str, Any]
    source: Mapping[str, Any]

    @classmethod
    def of_record(cls, record: Record) -> Stated:
        artifact = record.read.get(SOURCE, {})
        source = {"type": artifact.get("type"), **artifact.get("describe", {})} if artifact else {}
        return cls(record.facts.get("parameters", {}), record.facts.get("runtime_params", {}), source)

    @classmethod
    def of_run(
        cls, catalog: CatalogProtocol, parameters: Mapping[str, Any], runtime_params: Mapping[str, Any]
    ) -> Stated:
        dataset: Any = catalog.get(SOURCE)
        described = {} if dataset is None else dataset._describe()
        names_no_file = "filepath" in described and not described["filepath"]
        source = {} if dataset is None or names_no_file else {"type": type(dataset).__name__, **described}
        return cls(mask_tree(dict(parameters)), mask_tree(dict(runtime_params)), mask_tree(source))

    def leaves(self, names: Sequence[str]) -> dict[str, Any]:
        """Return dotted key → value of the given names, without parameters that other parameters make unused."""
        flat = flatten(self.parameters)
        chosen = {
            key: value
            for key, value in flat.items()
            if any(key == name or key.startswith(f"{name}.") for name in names)
        }
        if flat.get("captions.num_rows") is None:
            chosen.pop("captions.sampling", None)
        if flat.get("captions.num_rows") is None or flat.get("captions.sampling") == "first":
            chosen.pop("captions.seed", None)
        if SOURCE in names:
            chosen |= {f"{SOURCE}.{name}": _plain(name, value) for name, value in flatten(self.source).items()}
        return chosen

    @property
    def file(self) -> str | None:
        """The file given on the command line."""
        given = self.runtime_params.get(_FILE)
        return None if given is None else str(given)


def check_stored_data(
    pipeline: Pipeline,
    catalog: CatalogProtocol,
    free_versions: Mapping[str, str],
    records: Sequence[Record],
    stated: Stated,
    env: str | None,
) -> None:
    """Refuse parameters that would give other data than the stored data that the pipeline reads.

    Raises:
        ParameterError: naming each parameter with both values, and the command that makes the data again.
    """
    takes_the_adapters_prompt = (
        "adapter" not in pipeline.all_outputs() and stated.parameters["scoring"]["settings_from"] == "adapter"
    )
    found: dict[str, Difference] = {}
    behind = _data_behind(free_versions, records)
    for name, (_, record) in behind.items():
        if name in pipeline.all_outputs():
            continue
        differences = _differences(Stated.of_record(record), stated, DECIDED_BY[name])
        if name == "conversations" and (
            takes_the_adapters_prompt or _asks_alike(catalog, behind, record, stated.parameters["prompt"])
        ):
            differences = []
        found |= {difference.key: difference for difference in differences}
    if found:
        raise ParameterError(_refusal(list(found.values()), stated, env))


def _data_behind(free_versions: Mapping[str, str], records: Sequence[Record]) -> dict[str, tuple[str, Record]]:
    """Map each dataset to the version that the free inputs are, or were made from, and to the run that wrote it.

    Versions that no record names, such as copied ones, are left out because nothing is known about them.
    """
    writers = {(name, version): record for record in records for name, version in record.complete_versions().items()}
    read = [item for item in free_versions.items() if item[0] in DECIDED_BY and item in writers]
    versions = dict(read)
    for item in read:
        for name, version in versions_behind(writers[item], records).items():
            versions.setdefault(name, version)
    return {
        name: (version, writers[name, version])
        for name, version in versions.items()
        if name in DECIDED_BY and (name, version) in writers
    }


def _differences(then: Stated, now: Stated, names: Sequence[str]) -> list[Difference]:
    """Return parameters that both state with different values. One that only this version has is not compared."""
    leaves_then, leaves_now = then.leaves(names), now.leaves(names)
    path = f"{SOURCE}.filepath"
    if now.file is not None and now.file == then.file and not Path(now.file).is_absolute():
        leaves_now.pop(path, None)  # a path relative to the project, which may have moved
    file_was_named = (then.file, now.file) != (None, None)
    if SOURCE in names and path in leaves_then:
        leaves_then.setdefault(f"{SOURCE}.image_folder", None)  # runs of earlier versions did not record it
    return [
        Difference(_FILE if key == path and file_was_named else key, leaves_then[key], value)
        for key, value in leaves_now.items()
        if key in leaves_then and leaves_then[key] != value
    ]


def _plain(name: str, value: Any) -> Any:
    """Return a value of the source's description; links in a path are resolved."""
    if name == "filepath" and isinstance(value, str) and value:
        return os.path.realpath(expand_home(str(value)))
    return value if isinstance(value, (str, int, float, bool, type(None), list)) else str(value)


def _asks_alike(
    catalog: CatalogProtocol, behind: Mapping[str, tuple[str, Record]], record: Record, prompt: Mapping[str, Any]
) -> bool:
    """Whether both prompts give the same conversations of the stored samples, which may have texts of their own."""
    samples: Any = catalog.get("samples")
    then = record.facts.get("parameters", {}).get("prompt")
    if then == prompt:
        return True
    if samples is None or "samples" not in behind or behind["samples"][0] not in samples.versions():
        return False
    try:
        one, other = (PromptParameters.model_validate(tree) for tree in (then, prompt))
        samples.pin(behind["samples"][0])
        return ask_alike(samples.load(), one, other)
    except (ValidationError, DataFormatError):  # a prompt of another version, or one that does not fit the samples
        return False


def _refusal(differences: Sequence[Difference], stated: Stated, env: str | None) -> str:
    listed = "\n".join(f"  {difference}" for difference in differences)
    kept = _as_params({difference.key: difference.then for difference in differences})
    keys = {difference.key for difference in differences}
    given = flatten(stated.runtime_params)
    deciding = [name for names in DECIDED_BY.values() for name in names]
    wanted = {
        key: value
        for key, value in given.items()
        if key in {*keys, _FILE, "recipe"} or any(key == name or key.startswith(f"{name}.") for name in deciding)
    }
    command = f"kedro run{f' --env {env}' if env else ''} --pipeline data_engineering{_as_params(wanted)}"
    return (
        f"The stored data were made with other parameters than those of this run (data → this run):\n{listed}\n"
        f"Make the data again with the parameters of this run: {command}\n"
        f"or use the parameters of the data:{kept or ' in parameters.yml.'}"
    )


def _as_params(values: Mapping[str, Any]) -> str:
    """Return ` --params "…"` with the values that it can express; lists and catalog entries belong in files."""
    pairs = [
        f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
        for key, value in values.items()
        if not isinstance(value, (list, dict)) and not key.startswith(f"{SOURCE}.")
    ]
    return f' --params "{",".join(pairs)}"' if pairs else ""
