"""The project's pipelines by name."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline, pipeline

_DEFAULT = ("data_engineering", "training", "evaluation")


def register_pipelines() -> dict[str, Pipeline]:
    """Every folder of `pipelines/`; `__default__` goes from raw pictures to the report."""
    pipelines = find_pipelines(raise_errors=True)
    if set(_DEFAULT) <= set(pipelines):
        pipelines["__default__"] = sum((pipelines[name] for name in _DEFAULT), pipeline([]))
    return pipelines
