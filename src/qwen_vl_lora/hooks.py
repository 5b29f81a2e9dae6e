"""What happens around a run: parameters are checked, inputs looked at, the run recorded and tracked, results shown."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import settings
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from qwen_vl_lora.console import expected_error
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.lineage.replay import check_foreign_configuration
from qwen_vl_lora.lineage.run import RunInterruptedError, current_run
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.pipelines.described import sentence_of
from qwen_vl_lora.preflight import check_run
from qwen_vl_lora.recording import RunRecorder, shared_settings
from qwen_vl_lora.tracking.modes import check_mode
from qwen_vl_lora.tracking.tracker import Ending, Tracker, begin_tracking, current_tracker, end_tracking

logger = logging.getLogger(__name__)


class ProjectHooks:
    """Stops a run that cannot succeed before its first node, and shows what came out of one that did."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        _check_environment(context)
        validate_parameters(dict(context.config_loader["parameters"]))

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        if run_params.get("only_missing_outputs"):
            raise ParameterError(
                "--only-missing-outputs is not supported: every version is kept, so old outputs would be taken "
                "for new ones. Name what is to run: --pipeline, --from-nodes."
            )
        check_run(pipeline, catalog)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        logger.info("%s: %s", node.name, sentence_of(node.func))

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        if "comparison_report" in pipeline.all_outputs():
            from rich.console import Console

            from qwen_vl_lora.scoring.summary import summarize_run

            report = catalog["comparison_report"].existing_path()
            Console().print(summarize_run(catalog["caption_metrics"].load(), catalog["predictions"].load(), report))


class LineageHooks:
    """Records every run whose first node starts, and makes pipelines read versions that belong together."""

    def __init__(self) -> None:
        self._context: KedroContext | None = None
        self._recorder: RunRecorder | None = None

    @hook_impl(tryfirst=True)
    def after_context_created(self, context: KedroContext) -> None:
        source, own = Path(context.config_loader.conf_source), context.project_path / settings.CONF_SOURCE
        if source.resolve() != own.resolve():
            check_foreign_configuration(source, own)
        self._context = context

    @hook_impl(trylast=True)  # a run that the checks refuse leaves nothing
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        if self._recorder is not None:  # Kedro tells hooks nothing of a Ctrl-C
            self._recorder.break_off()
            self._recorder = None
        if self._context is not None:
            self._recorder = RunRecorder(self._context, catalog, pipeline, run_params)

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        if self._recorder is not None:
            self._recorder.note_read(dataset_name, data)

    @hook_impl
    def before_node_run(self) -> None:
        if self._recorder is not None:
            self._recorder.start()

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
    """Opens a SwanLab run for a run that trains or evaluates, and closes it however that run ends."""

    def __init__(self) -> None:
        self._context: KedroContext | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        self._context = context

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        end_tracking("aborted", "Another run began before this one had ended.")  # Kedro tells hooks nothing of a Ctrl-C
        if self._context is None or not pipeline.all_outputs() & {"training_log", "caption_metrics"}:
            return
        parameters = dict(self._context.config_loader["parameters"])
        settings = validate_parameters(parameters).swanlab
        check_mode(settings)
        recipe = shared_settings(self._context, parameters)["recipe"]
        begin_tracking(Tracker(settings, self._context.project_path / "logs" / "swanlab" / recipe, _outline))

    @hook_impl
    def before_node_run(self) -> None:
        if (tracker := current_tracker()) is not None:
            tracker.warm_up()

    @hook_impl
    def after_node_run(self, inputs: dict[str, Any]) -> None:
        tracker = current_tracker()
        if tracker is not None and {"predictions", "caption_metrics", "images"} <= inputs.keys():
            pictures = partial(_predicted_pictures, inputs["predictions"], inputs["images"])
            tracker.log_evaluation(inputs["caption_metrics"], pictures)

    @hook_impl(tryfirst=True)  # while the run that it describes is still there
    def on_pipeline_error(self, error: Exception) -> None:
        expected = expected_error(error)
        ending: Ending = "aborted" if isinstance(expected, RunInterruptedError) else "crashed"
        end_tracking(ending, f"{type(expected or error).__name__}: {expected or error}")

    @hook_impl(tryfirst=True)
    def after_pipeline_run(self) -> None:
        end_tracking("success")


def _check_environment(context: KedroContext) -> None:
    source = Path(context.config_loader.conf_source)
    if context.env is None or not source.is_dir() or (source / context.env).is_dir():
        return
    there = sorted(path.name for path in source.iterdir() if path.is_dir())
    raise ParameterError(
        f"--env names {context.env!r}, but {source} holds no such environment{nearest(context.env, set(there))}. "
        f"There are: {', '.join(there)}."
    )


def _outline() -> dict[str, Any]:
    run = current_run()
    return {} if run is None else run.outline()


def _predicted_pictures(predictions: Any, images: Any, number: int) -> list[tuple[Any, str]]:
    """The first held-out pictures, each with what both models and people said of it."""
    pictures = []
    for row in predictions.head(number).to_dict("records"):
        references = json.loads(row["references"])
        text = f"tuned: {row['tuned_caption']}\nbase: {row['base_caption']}\nreference: {references[0]}"
        pictures.append((images.open(images.by_path(row["image_path"]).sha256), text))
    return pictures
