"""Kedro hooks of a run: check parameters and inputs, record and track the run, print the results.

What only a run needs is imported when it begins, not when pipelines are listed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol, DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from qwen_vl_lora.datasets.adapter import AdapterDataset
from qwen_vl_lora.datasets.workspace import WorkspaceDataset, places_in
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import Parameters, validate_parameters
from qwen_vl_lora.pipelines.described import sentence_of
from qwen_vl_lora.runs.adapters import ADAPTER
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.record_schema import Outcome
from qwen_vl_lora.runs.run import RunInterruptedError, current_run
from qwen_vl_lora.session.console import expected_error
from qwen_vl_lora.session.packaged import own_configuration
from qwen_vl_lora.session.selection import refuse_parallel_runner
from qwen_vl_lora.tracking.choice import choose_trackers
from qwen_vl_lora.tracking.tracker import (
    Picture,
    Tracker,
    begin_tracking,
    current_tracker,
    end_tracking,
    picture_text,
)

if TYPE_CHECKING:
    from qwen_vl_lora.session.recording import RunRecorder

logger = logging.getLogger(__name__)

SETTINGS = "params:settings"


class ProjectHooks:
    """Stops a run that cannot succeed before its first node, and prints the results of a finished run."""

    def __init__(self) -> None:
        self._parameters: Parameters | None = None
        self._context: KedroContext | None = None
        self._started = 0
        self._num_nodes = 0
        self._stated: frozenset[str] | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        from qwen_vl_lora.session.sound_settings import stated_keys

        self._context = context
        self._parameters = validate_parameters(dict(context.config_loader["parameters"]))
        self._stated = stated_keys(context)

    @hook_impl
    def after_catalog_created(self, catalog: CatalogProtocol) -> None:
        """Register the validated settings as one input: Kedro types `params:` names and skips keys it does not know."""
        catalog[SETTINGS] = MemoryDataset(self._parameters, copy_mode="assign")

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        if run_params.get("only_missing_outputs"):
            raise ParameterError(
                "--only-missing-outputs is not supported: every version is kept, so old outputs would be taken "
                "for new ones. Select what to run: --pipeline, --from-nodes."
            )
        from qwen_vl_lora.session.preflight import check_run
        from qwen_vl_lora.session.sound_settings import check_settings

        refuse_parallel_runner(str(run_params.get("runner")))
        if self._parameters is not None:
            if self._parameters.inference.adapter == "none":
                leave_out_adapter(pipeline, catalog)
            check_settings(pipeline, catalog, self._parameters, self._stated)
            check_run(pipeline, catalog, self._parameters)
        self._catalog = catalog
        self._started, self._num_nodes = 0, len(pipeline.nodes)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        self._started += 1
        logger.info("%d of %d, %s: %s", self._started, self._num_nodes, node.name, sentence_of(node.func))

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        if dataset_name == "collection_summary":
            from qwen_vl_lora.samples.tally import told

            rejected: Any = self._catalog["rejected_samples"]
            for line in told(data, relative(rejected.existing_path(), Path.cwd())):
                logger.warning("%s", line)
        if dataset_name == "caption_metrics" and isinstance(adapter := self._catalog.get("adapter"), AdapterDataset):
            adapter.describe_metrics(data)
        if dataset_name == "data_page":
            page: Any = self._catalog["data_page"]
            logger.info("The data before training: %s", relative(page.existing_path(), Path.cwd()))

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        from qwen_vl_lora.session.recording import shared_settings
        from qwen_vl_lora.session.results import tell_results

        if self._context is not None:
            recipe = shared_settings(self._context, dict(self._context.config_loader["parameters"]))["recipe"]
            tell_results(pipeline, catalog, Path(self._context.project_path), recipe)


def leave_out_adapter(pipeline: Pipeline, catalog: Any) -> None:
    """Give the inference pipeline no adapter: nothing is loaded, looked for or recorded.

    Raises:
        ParameterError: if the run uses an adapter elsewhere too.
    """
    if "captions" not in pipeline.all_outputs():
        return
    others = [
        node.name
        for node in pipeline.nodes
        if ADAPTER in {*node.inputs, *node.outputs} and "captions" not in node.outputs
    ]
    if others:
        raise ParameterError(
            f"inference.adapter is `none`, but the run uses an adapter in {', '.join(others)}. Run inference alone "
            "(kedro run --pipeline inference), or set inference.adapter: trained."
        )
    catalog[ADAPTER].leave_out()


class LineageHooks:
    """Records every run whose first node starts, and makes pipelines read versions that belong together."""

    def __init__(self) -> None:
        self._context: KedroContext | None = None
        self._recorder: RunRecorder | None = None

    @hook_impl(tryfirst=True)
    def after_context_created(self, context: KedroContext) -> None:
        from qwen_vl_lora.session.configuration import check_configuration

        check_configuration(context)
        self._context = context

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        workspace = catalog.get("workspace")
        if self._context is not None and isinstance(workspace, WorkspaceDataset):
            project = Path(self._context.project_path)
            workspace.know(places_in(catalog.config_resolver.resolve_pattern, project), project)

    @hook_impl(trylast=True)  # a run that the checks refuse leaves nothing
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        from qwen_vl_lora.session.recording import RunRecorder

        if self._recorder is not None:  # Kedro calls no hook on Ctrl-C
            self._recorder.break_off()
            self._recorder = None
        if self._context is not None:
            self._recorder = RunRecorder(self._context, catalog, pipeline, run_params)

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        if self._recorder is not None:
            self._recorder.note_read(dataset_name, data)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        if self._recorder is not None:
            self._recorder.start(node.name)

    @hook_impl
    def after_node_run(self, node: Node) -> None:
        if self._recorder is not None:
            self._recorder.note_seconds(node.name)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        if self._recorder is not None:
            self._recorder.note_written(dataset_name, data)

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        if self._recorder is not None:
            self._recorder.fail(error)
            self._recorder = None

    @hook_impl
    def after_pipeline_run(self) -> None:
        if self._recorder is not None:
            self._recorder.finish()
            self._recorder = None


class TrackingHooks:
    """Starts trackers for a run that trains or evaluates, and reports its end to them, however it ends."""

    def __init__(self) -> None:
        self._context: KedroContext | None = None
        self._chosen: list[Tracker] = []

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        self._context = context

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        from qwen_vl_lora.session.recording import shared_settings

        # Kedro calls no hook on Ctrl-C.
        end_tracking("interrupted", "Another run began before this one had ended.")
        self._chosen = []
        if self._context is not None and pipeline.all_outputs() & {"training_log", "caption_metrics"}:
            parameters = dict(self._context.config_loader["parameters"])
            recipe, logs = shared_settings(self._context, parameters)["recipe"], self._context.project_path / "logs"
            source = Path(self._context.config_loader.conf_source)
            conf = own_configuration(source, self._context.project_path)
            own = [conf / env for env in ("base", self._context.env or "local")]
            self._chosen = choose_trackers(validate_parameters(parameters), logs, recipe, own)

    @hook_impl
    def before_node_run(self) -> None:
        chosen, self._chosen = self._chosen, []
        if chosen:
            begin_tracking(chosen)

    @hook_impl(trylast=True)  # the recorder knows by then where it is
    def after_dataset_saved(self, dataset_name: str) -> None:
        tracker, run = current_tracker(), current_run()
        if dataset_name != "adapter" or tracker is None or run is None or self._context is None:
            return
        if path := run.written.get(dataset_name, {}).get("path"):
            tracker.log_adapter(self._context.project_path / path)

    @hook_impl
    def after_node_run(self, inputs: dict[str, Any]) -> None:
        tracker = current_tracker()
        if tracker is not None and {"predictions", "caption_metrics", "images"} <= inputs.keys():
            pictures = partial(_predicted_pictures, inputs["predictions"], inputs["images"])
            tracker.log_evaluation(inputs["caption_metrics"], pictures)

    @hook_impl(tryfirst=True)  # before the recorder closes the run that the tracker describes
    def on_pipeline_error(self, error: Exception) -> None:
        expected = expected_error(error)
        outcome: Outcome = "interrupted" if isinstance(expected, RunInterruptedError) else "failed"
        end_tracking(outcome, f"{type(expected or error).__name__}: {expected or error}")

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self) -> None:
        end_tracking("finished")


def _predicted_pictures(predictions: Any, images: Any) -> Iterator[Picture]:
    """Held-out images, each with the captions of both models and a reference."""
    for row in predictions.itertuples():
        references = json.loads(row.references)
        text = picture_text(row.tuned_caption, row.base_caption, references[0])
        yield images.open(images.by_path(row.image_path).sha256), text
