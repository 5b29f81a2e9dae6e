"""Checks that what `kedro run` is asked to run is there: runner, pipelines, tags, nodes and datasets.

Kedro answers a mistyped name with a traceback.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from kedro.framework.project import pipelines
from kedro.pipeline import Pipeline

import qwen_vl_lora.pipelines
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.session.configuration import RUNNERS

DEFAULT = "__default__"
PARTS = ("tags", "node_names", "from_nodes", "to_nodes", "from_inputs", "to_outputs")
"""Options that select a part of the pipelines."""

_SHOWN = {"node_names": "--nodes", "pipelines": "--pipeline or --pipelines"}


def pipeline_names() -> set[str]:
    """Return the names of all pipelines. Imports none of them: each is a folder of `pipelines/`."""
    found = pkgutil.iter_modules(qwen_vl_lora.pipelines.__path__)
    return {DEFAULT, *(module.name for module in found if module.ispkg)}


def check_selection(options: Mapping[str, Any]) -> None:
    """Refuse options of `kedro run` that select what is not there.

    Args:
        options: of `kedro run`, by name; `pipelines` holds those of `--pipeline` too.

    Raises:
        ParameterError: with the option, the unknown name, the nearest one and all that there are.
    """
    if runner := options.get("runner"):
        refuse_parallel_runner(runner)
        if "." not in runner:
            _check_names("runner", [runner], set(RUNNERS))
    chosen: Sequence[str] = options.get("pipelines") or ()
    _check_names("pipelines", chosen, pipeline_names())
    if not any(options.get(name) for name in PARTS):
        return
    pipelines.set_requested(list(chosen) or None)
    whole = sum((pipelines[name] for name in chosen or (DEFAULT,)), Pipeline([]))
    tags, nodes = {tag for node in whole.nodes for tag in node.tags}, {node.name for node in whole.nodes}
    for option, known in zip(PARTS, (tags, nodes, nodes, nodes, whole.datasets(), whole.datasets()), strict=True):
        _check_names(option, options.get(option) or (), known)


def refuse_parallel_runner(runner: str) -> None:
    """Refuse a runner whose processes call no dataset and node hooks.

    Args:
        runner: name or description of the runner.

    Raises:
        ParameterError: naming what to use instead.
    """
    if "ParallelRunner" in runner:
        raise ParameterError(
            "--runner ParallelRunner is not supported: its processes call no hooks, so the run would have no record. "
            "Use ThreadRunner, or omit --runner. To use several GPUs, set cluster.processes."
        )


def _check_names(option: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            shown = _SHOWN.get(option, "--" + option.replace("_", "-"))
            raise ParameterError(
                f"{shown} names {name!r}, which does not exist{nearest(name, known)}. "
                f"There are: {', '.join(sorted(known))}."
            )
