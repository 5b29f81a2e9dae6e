"""From Kedro's hooks to a run record: what a run reads and writes, which versions it may read, how it ended."""

from __future__ import annotations

import atexit
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from kedro.framework.context import KedroContext
from kedro.io import AbstractVersionedDataset, CatalogProtocol, MemoryDataset
from kedro.pipeline import Pipeline

from qwen_vl_lora.datasets.artifacts import AtomicVersionedDataset
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.runs.adapters import ADAPTER, adapter_in_words, data_in_words, trained_adapters
from qwen_vl_lora.runs.artifacts import describe_artifact, digest, relative
from qwen_vl_lora.runs.comparison import differing_settings
from qwen_vl_lora.runs.consistency import choose_versions
from qwen_vl_lora.runs.foreign import SEAL_FILE, seal_of
from qwen_vl_lora.runs.given_command import given_command
from qwen_vl_lora.runs.masking import mask_text, mask_tree
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.runs.records import Record, RecordWriter, all_records, read_records, runs_folder
from qwen_vl_lora.runs.replay import replay_options, stored_configuration
from qwen_vl_lora.runs.run import Artifact, Run, RunInterruptedError, begin_run, end_run
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.runs.surroundings import describe_computing, describe_surroundings
from qwen_vl_lora.session.console import expected_error, say
from qwen_vl_lora.session.stored_data import Stated, check_stored_data

RESULTS = ("training_summary", "caption_metrics")
"""Small artifacts whose content stands in the record too, so that runs can be compared after a prune."""

DATA = ("train_conversations", "test_conversations", "conversations", "samples", "images")
"""Datasets by any of which a run takes the data of an earlier one; the first that it reads names them."""

_SHARED_TAGS = frozenset({"compute"})


class RunRecorder:
    """Records one run. Nothing is written before its first node starts.

    Raises:
        MissingArtifactError: if the stored versions that the pipeline needs do not belong together.
        ParameterError: if stored data were made with other parameters, or the adapter trained with another prompt.
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
        stated = Stated.of_run(catalog, self._parameters, run_params.get("runtime_params") or {})
        check_stored_data(pipeline, catalog, self._free_versions, records, stated, context.env)
        check_prompt(pipeline, catalog, self._free_versions, records, self._parameters)
        for line in chosen_inputs(self._root, self._shared["recipe"], self._free_versions, run_params):
            say(line, err=True)
        self._run: Run = begin_run(run_params["run_id"])
        self._writer = RecordWriter(runs / self._run.id, self._run)
        self._notes = threading.RLock()
        self._begun: dict[str, float] = {}
        self._run.facts |= self._facts(records)
        self._stop_signal = _StopSignal()

    def _facts(self, records: Sequence[Record]) -> dict[str, Any]:
        pipelines = list(self._run_params.get("pipeline_names") or ["__default__"])
        return {
            "recipe": self._shared["recipe"],
            "pipelines": pipelines,
            "env": self._context.env,
            "configuration": relative(Path(self._context.config_loader.conf_source), self._root),
            "command": given_command(),
            "runtime_params": mask_tree(dict(self._run_params.get("runtime_params") or {})),
            "parameters": mask_tree(self._parameters),
            "stages": _stages(self._pipeline, self._catalog),
            "free_inputs": self._free_versions,
            "made_from": _data_runs(self._free_versions, records),
            "results": {},
            "node_seconds": {},
        }

    def start(self, node: str) -> None:
        """A node begins. With the first, write the record and the run's configuration."""
        with self._notes:
            self._begun[node] = time.monotonic()
            if self._writer.is_open:
                return
            self._stop_signal.watch()
            self._run.facts |= describe_surroundings(self._root, self._parameters["device"])
            pipelines = list(self._run_params.get("pipeline_names") or [])
            folder = relative(self._writer.folder, self._root)
            replay = replay_options(folder, pipelines, self._free_versions, self._run_params)
            catalog = self._context.config_loader["catalog"]
            stored = stored_configuration(catalog, self._parameters, self._shared, replay)
            self._writer.open({**stored, SEAL_FILE: seal_of(self._root, stored)})
            atexit.register(self.break_off)

    def note_seconds(self, node: str) -> None:
        """A node has ended: note the wall time of its function, without what Kedro loads and saves around it."""
        with self._notes:
            self._run.facts["node_seconds"][node] = round(time.monotonic() - self._begun[node], 2)

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
        described = described_artifact(name, self._catalog.get(name), data, self._root)
        if isinstance(data, BaseModel):
            self._run.facts["base_model"] = {"name": mask_text(data.name), "fingerprint": data.fingerprint}
        return described


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


def described_artifact(name: str, dataset: Any, data: Any, root: Path) -> Artifact | None:
    """What a record says of a dataset that was loaded or saved: its own word, or that of a stock Kedro dataset.

    None of what is in memory alone.
    """
    if hasattr(dataset, "describe_artifact"):
        own: Artifact | None = dataset.describe_artifact(name, data, root)
        return own
    if dataset is None or isinstance(dataset, MemoryDataset):
        return None
    if isinstance(dataset, AbstractVersionedDataset):
        return describe_artifact(name, Path(dataset._get_load_path()), root, dataset.resolve_load_version())
    described = mask_tree({key: _plain(value) for key, value in dataset._describe().items()})
    artifact: Artifact = {"version": None, "type": type(dataset).__name__, "describe": described}
    path = Path(str(described.get("filepath") or ""))
    if path.is_file():
        return {**artifact, "path": relative(path, root), "sha256": file_sha256(path)}
    return {**artifact, "sha256": None, "content_sha256": digest(described)}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None), list, dict)) else str(value)


def chosen_inputs(
    project: Path, recipe: str, free_versions: Mapping[str, str], run_params: Mapping[str, Any]
) -> list[str]:
    """Return one line for each thing that a run takes from earlier runs: the adapter, and the data.

    Args:
        free_versions: result of `pin_free_inputs`.
    """
    records = all_records(project)
    lines = []
    if ADAPTER in free_versions:
        named = ADAPTER in (run_params.get("load_versions") or {})
        adapters = trained_adapters(records, project)
        why = "named by --load-versions" if named else f"the newest of recipe {recipe}"
        own = [adapter.version for adapter in adapters if adapter.record.recipe == recipe]
        if not named and own and own[-1] != free_versions[ADAPTER]:
            why += " that belongs with the other inputs"
        lines.append(
            adapter_in_words(recipe, free_versions[ADAPTER], adapters, why, '--load-versions "adapter:VERSION"')
        )
    data = next((name for name in DATA if name in free_versions), None)
    for record in records:
        if data and record.recipe == recipe and record.complete_versions().get(data) == free_versions[data]:
            lines.append(data_in_words(record, free_versions[data]))
    return lines


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
    """Whether an adapter of an earlier run is to be asked what it was trained with, as far as that is known here.

    Conversations that the run will write itself ask what is configured, unless samples bring their own questions,
    as those of the adapter did then: evaluation compares them once they are there.

    Raises:
        ParameterError: naming what differs, or the questions to choose from where several were trained.
    """
    if "adapter" not in free_versions:
        return
    trained = catalog["adapter"].load().trained_prompt
    if "captions" in pipeline.all_outputs() and parameters["inference"]["settings_from"] == "adapter":
        if trained.choose() is None:
            raise ParameterError(trained.refusal())
        return
    if "test_conversations" not in pipeline.all_outputs():
        return
    writer = next((r for r in records if r.complete_versions().get("adapter") == free_versions["adapter"]), None)
    then = None if writer is None else writer.facts.get("parameters", {}).get("prompt")
    if not trained.questions.is_one or (then and then.get("user") != trained.questions.texts[0][0]):
        return
    differences = differing_settings({"prompt": parameters["prompt"]}, {"prompt": trained.to_record()})
    if differences:
        raise ParameterError(
            f"The conversations would ask another prompt than the adapter was trained with: {'; '.join(differences)}. "
            "Set `prompt` to what it was trained with, or train on the new conversations."
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
