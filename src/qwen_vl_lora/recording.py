"""From Kedro's hooks to a run record: what a run reads and writes, which versions it may read, how it ended."""

from __future__ import annotations

import atexit
import shlex
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from kedro.framework.context import KedroContext
from kedro.io import AbstractVersionedDataset, CatalogProtocol, MemoryDataset
from kedro.pipeline import Pipeline

from qwen_vl_lora.console import expected_error
from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset
from qwen_vl_lora.datasets.base_model import BaseModelDataset
from qwen_vl_lora.datasets.image_features import ImageFeaturesDataset
from qwen_vl_lora.datasets.workspace import WorkspaceDataset
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.features.store import StagedShards
from qwen_vl_lora.lineage.artifacts import describe_artifact, digest, relative
from qwen_vl_lora.lineage.comparison import differing_settings
from qwen_vl_lora.lineage.consistency import choose_versions
from qwen_vl_lora.lineage.masking import mask_text, mask_tree
from qwen_vl_lora.lineage.records import Outcome, Record, RecordWriter, read_records, runs_folder
from qwen_vl_lora.lineage.replay import replay_options, stored_configuration
from qwen_vl_lora.lineage.run import Artifact, Run, RunInterruptedError, begin_run, end_run
from qwen_vl_lora.lineage.storage import file_sha256
from qwen_vl_lora.lineage.surroundings import describe_computing, describe_surroundings

RESULTS = ("training_summary", "caption_metrics")
"""Small artifacts whose content stands in the record too, so that runs can be compared after a prune."""

_SHARED_TAGS = frozenset({"compute"})


class RunRecorder:
    """Records one run. Nothing is written before its first node starts.

    Raises:
        MissingArtifactError: if the stored versions that the pipeline needs do not belong together.
        ParameterError: if the stored conversations ask otherwise than the adapter is to be asked.
    """

    def __init__(
        self, context: KedroContext, catalog: CatalogProtocol, pipeline: Pipeline, run_params: Mapping[str, Any]
    ) -> None:
        self._context = context
        self._catalog = catalog
        self._pipeline = pipeline
        self._run_params = run_params
        self._root = context.project_path
        self._parameters = dict(context.config_loader["parameters"])
        self._shared = shared_settings(context, self._parameters)
        runs = runs_folder(self._root, self._shared["recipe"])
        records = read_records(runs)
        self._free_versions = pin_free_inputs(pipeline, catalog, records)
        check_prompt(pipeline, catalog, self._free_versions, records, self._parameters)
        self._run: Run = begin_run(run_params["run_id"])
        self._writer = RecordWriter(runs / self._run.id, self._run)
        self._notes = threading.RLock()
        self._run.facts |= self._facts(records)
        self._stop_signal = _StopSignal()

    def _facts(self, records: Sequence[Record]) -> dict[str, Any]:
        pipelines = list(self._run_params.get("pipeline_names") or ["__default__"])
        return {
            "recipe": self._shared["recipe"],
            "pipelines": pipelines,
            "env": self._context.env,
            "configuration": relative(Path(self._context.config_loader.conf_source), self._root),
            "command": mask_text(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
            "runtime_params": mask_tree(dict(self._run_params.get("runtime_params") or {})),
            "parameters": mask_tree(self._parameters),
            "stages": _stages(self._pipeline, self._catalog),
            "free_inputs": self._free_versions,
            "made_from": _data_runs(self._free_versions, records),
            "results": {},
        }

    def start(self) -> None:
        """Write the record and the run's configuration, once."""
        with self._notes:
            if self._writer.is_open:
                return
            self._stop_signal.watch()
            self._run.facts |= describe_surroundings(self._root, self._parameters["device"])
            pipelines = list(self._run_params.get("pipeline_names") or [])
            folder = relative(self._writer.folder, self._root)
            replay = replay_options(folder, pipelines, self._free_versions, self._run_params)
            catalog = self._context.config_loader["catalog"]
            self._writer.open(stored_configuration(catalog, self._parameters, self._shared, replay))
            atexit.register(self.break_off)

    def note_read(self, name: str, data: Any) -> None:
        """Note what was loaded."""
        with self._notes:
            if name in self._run.read:
                return
            artifact = self._run.written.get(name) or self._describe(name, data)
            if artifact is not None:
                self._run.read[name] = artifact
                self._update()

    def note_written(self, name: str, data: Any) -> None:
        """Note what was saved."""
        with self._notes:
            artifact = self._describe(name, data)
            if artifact is not None:
                self._run.written[name] = artifact
            if name in RESULTS and isinstance(data, dict):
                self._run.facts["results"][name] = data
            self._update()

    def fail(self, error: Exception) -> None:
        """The run ended with an error."""
        expected = expected_error(error)
        outcome: Outcome = "interrupted" if isinstance(expected, RunInterruptedError) else "failed"
        self._end(outcome, mask_text(f"{type(expected or error).__name__}: {expected or error}"))

    def finish(self) -> None:
        """The run did all it was asked for."""
        self._end("finished")

    def break_off(self) -> None:
        """The process ends, or begins another run, while this one is under way: Ctrl-C, SIGTERM."""
        self._end("interrupted", self._stop_signal.message or "The process ended before the run did.")

    def _end(self, outcome: Outcome, message: str | None = None) -> None:
        atexit.unregister(self.break_off)
        self._stop_signal.ignore()
        end_run(finished=outcome == "finished")
        if self._writer.is_open:
            self._run.facts |= describe_computing(self._parameters["device"])
            self._writer.close(outcome, message)

    def _update(self) -> None:
        if self._writer.is_open:
            self._writer.update()

    def _describe(self, name: str, data: Any) -> Artifact | None:
        if name.startswith("params:") or name == "parameters":
            return None
        dataset: Any = self._catalog.get(name)
        if dataset is None or isinstance(dataset, (MemoryDataset, WorkspaceDataset)):
            return None
        if isinstance(dataset, BaseModelDataset):
            return self._describe_base_model(data)
        if isinstance(dataset, ImageFeaturesDataset):
            return self._describe_features(data)
        if isinstance(dataset, AtomicVersionedDataset):
            return describe_artifact(name, dataset.existing_path(), self._root, dataset.resolve_load_version())
        if isinstance(dataset, AbstractVersionedDataset):
            path = Path(dataset._get_load_path())
            return describe_artifact(name, path, self._root, dataset.resolve_load_version())
        return self._describe_source(dataset)

    def _describe_base_model(self, base_model: Any) -> Artifact:
        described = {
            "version": base_model.revision,
            "path": relative(base_model.path, self._root),
            "sha256": base_model.fingerprint,
            "files": base_model.files,
        }
        self._run.facts["base_model"] = {"name": mask_text(base_model.name), "fingerprint": base_model.fingerprint}
        return described

    def _describe_features(self, data: Any) -> Artifact:
        """Which shards of which keys hold the features; how pictures are spread over them says nothing of them."""
        key = data.key.digest if isinstance(data, StagedShards) and data.key is not None else None
        store: Any = self._catalog.get("image_features")
        root = store.load().root
        shards = sorted(root.glob(f"{key or '*'}/*.safetensors")) if key or not isinstance(data, StagedShards) else []
        files = {f"{shard.parent.name}/{shard.name}": shard.stem for shard in shards}
        keys = sorted({shard.parent.name for shard in shards})
        described = {"version": None, "path": relative(root, self._root), "keys": keys}
        return {**described, "sha256": digest(files), "content_sha256": None, "files": files}

    def _describe_source(self, dataset: Any) -> Artifact:
        described = mask_tree({key: _plain(value) for key, value in dataset._describe().items()})
        artifact: Artifact = {"version": None, "type": type(dataset).__name__, "describe": described}
        path = Path(str(described.get("filepath") or ""))
        if path.is_file():
            return {**artifact, "path": relative(path, self._root), "sha256": file_sha256(path)}
        return {**artifact, "sha256": None, "content_sha256": digest(described)}


class _StopSignal:
    """SIGTERM ends the process as Ctrl-C does: saves are cleaned up, the record says so."""

    def __init__(self) -> None:
        self.message: str | None = None
        self._watches = False

    def watch(self) -> None:
        """Take SIGTERM over, where nobody else has."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._stop)
            self._watches = True

    def ignore(self) -> None:
        """Give SIGTERM back."""
        if self._watches and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._watches = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.message = "Stopped by SIGTERM. What was saved stays; the same command starts over."
        raise SystemExit(f"\n{self.message}")


def pin_free_inputs(pipeline: Pipeline, catalog: CatalogProtocol, records: Sequence[Record]) -> dict[str, str]:
    """Make the pipeline read versions of one complete run, and say which they are.

    Versions that the user named stay.
    """
    datasets: dict[str, AtomicVersionedDataset] = {}
    for name in sorted(pipeline.inputs()):
        dataset = None if name.startswith("params:") or name == "parameters" else catalog.get(name)
        if isinstance(dataset, AtomicVersionedDataset) and dataset.versions():
            datasets[name] = dataset
    named = {name: version for name, dataset in datasets.items() if (version := dataset.pinned_version)}
    stored = {name: dataset.versions() for name, dataset in datasets.items()}
    chosen = choose_versions(records, stored, named)
    for name, version in chosen.items():
        datasets[name].pin(version)
    return {name: {**named, **chosen}[name] for name in datasets}


def check_prompt(
    pipeline: Pipeline,
    catalog: CatalogProtocol,
    free_versions: Mapping[str, str],
    records: Sequence[Record],
    parameters: Mapping[str, Any],
) -> None:
    """Whether conversations ask what training will record, or what the adapter was trained to be asked.

    Their questions are written by data_engineering; a prompt that was changed since would be recorded, and not used.

    Raises:
        ParameterError: naming what differs.
    """
    asked = dict(parameters["prompt"])
    if "train_conversations" in free_versions:
        _require_prompt(_written_prompt("train_conversations", free_versions, records), asked, "is configured")
        return
    if parameters["scoring"]["settings_from"] == "parameters":  # evaluation itself compares the adapter with them
        return
    if "adapter" in free_versions and "test_conversations" in pipeline.all_outputs():
        _require_prompt(asked, catalog["adapter"].load().record.get("prompt"), "the adapter was trained with")


def _written_prompt(name: str, versions: Mapping[str, str], records: Sequence[Record]) -> Mapping[str, Any] | None:
    """The prompt of the run that wrote a version."""
    writers = [record for record in records if record.complete_versions().get(name) == versions[name]]
    return writers[0].facts.get("parameters", {}).get("prompt") if writers else None


def _require_prompt(written: Mapping[str, Any] | None, wanted: Mapping[str, Any] | None, whose: str) -> None:
    differences = differing_settings({"prompt": written}, {"prompt": wanted}) if written and wanted else []
    if differences:
        raise ParameterError(
            f"The conversations ask with another prompt than {whose}: {'; '.join(differences)}. "
            "Run data_engineering with the prompt that is wanted, or set `prompt` to that of the data."
        )


def shared_settings(context: KedroContext, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """globals.yml, with what the command line says of its keys."""
    shared = dict(context.config_loader["globals"])
    return {name: parameters.get(name) or value for name, value in shared.items()}


def _stages(pipeline: Pipeline, catalog: CatalogProtocol) -> dict[str, list[str]]:
    """Stage → catalog entries that its nodes write. A stage is one pipeline's part of the run."""
    stages: dict[str, set[str]] = {}
    for node in pipeline.nodes:
        for stage in node.tags - _SHARED_TAGS or {"run"}:
            stages.setdefault(stage, set()).update(name for name in node.outputs if catalog.get(name) is not None)
    return {stage: sorted(names) for stage, names in sorted(stages.items())}


def _data_runs(free_versions: Mapping[str, str], records: Sequence[Record]) -> list[dict[str, Any]]:
    """The runs that wrote the free inputs: id, source and parameters, for a reader without this project."""
    writers = [r for r in records if any(r.complete_versions().get(n) == v for n, v in free_versions.items())]
    return [
        {
            "id": record.id,
            "pipelines": record.facts.get("pipelines"),
            "source": record.read.get("captioned_images"),
            "parameters": record.facts.get("parameters"),
        }
        for record in writers
    ]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)
