"""A mistyped pipeline, tag, node, dataset, runner or environment is one message with the nearest name."""

import runpy
import sys
from pathlib import Path

import pytest
from kedro.framework.startup import bootstrap_project

import qwen_vl_lora
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.session.configuration import _check_environment
from qwen_vl_lora.session.selection import check_selection, pipeline_names, refuse_parallel_runner

PROJECT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _project():
    bootstrap_project(PROJECT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pipelines": ["traning"]},
            "--pipeline or --pipelines names 'traning', which does not exist; nearest: training. There are: _",
        ),
        ({"tags": ["trainig"]}, "--tags names 'trainig', which does not exist; nearest: training"),
        ({"from_nodes": ["train_adaptor"]}, "--from-nodes names 'train_adaptor', .*; nearest: train_adapter"),
        ({"node_names": ["train_adapter"], "pipelines": ["evaluation"]}, "--nodes names .* There are: build_report, "),
        ({"to_outputs": ["adaptor"]}, "--to-outputs names 'adaptor', which does not exist; nearest: adapter"),
        ({"runner": "ThreadRuner"}, "--runner names 'ThreadRuner', .*; nearest: ThreadRunner"),
        ({"runner": "ParallelRunner"}, "--runner ParallelRunner is not supported: its processes call no hooks"),
        ({"runner": "kedro.runner.ParallelRunner"}, "Use ThreadRunner, or omit --runner"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(options, message):
    with pytest.raises(ParameterError, match=message):
        check_selection(options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pipelines": ["__default__"]},
        {"runner": "ThreadRunner", "tags": ["training", "evaluation"]},
        {
            "runner": "mine.Runner",
            "pipelines": ["training"],
            "from_nodes": ["train_adapter"],
            "from_inputs": ["images"],
        },
    ],
)
def test_what_is_there_is_taken(options):
    check_selection(options)


def test_the_names_of_pipelines_are_known_without_importing_them():
    from kedro.framework.project import pipelines

    pipelines.set_requested(None)
    assert pipeline_names() == set(pipelines)


def test_a_runner_of_a_notebook_is_refused_too():
    from kedro.runner import ParallelRunner, ThreadRunner

    refuse_parallel_runner(str(ThreadRunner()))
    with pytest.raises(ParameterError, match="ParallelRunner is not supported"):
        refuse_parallel_runner(str(ParallelRunner()))


def test_the_default_recipe_needs_no_environment():
    with pytest.raises(ParameterError, match="--env names 'tiny', the default recipe, which needs no --env"):
        _check_environment("tiny", PROJECT / "conf")


def test_on_windows_the_package_says_where_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="On Windows, install and run it in WSL"):
        runpy.run_path(qwen_vl_lora.__file__)
