"""A copy of the project to run pipelines in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from made_once import made_once

PROJECT = Path(__file__).parents[2]
SLICE = {
    "captions": {"num_rows": 40},
    "split": {"test_images": 6, "validation_images": 4},
    "training_args": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "save_steps": 2},
    "generation": {"max_new_tokens": 4},
    "scoring": {"bootstrap_samples": 10},
    "swanlab": {"mode": "disabled"},
}
SMALL = {"generation": {"max_new_tokens": 4, "batch_size": 2}}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's configuration in a folder of its own, without data."""
    shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    (tmp_path / "src").mkdir()  # the package itself is installed
    monkeypatch.chdir(tmp_path)
    bootstrap_project(tmp_path)
    return tmp_path


@pytest.fixture
def fresh_run(project, base_path):
    """`fresh_run("training", lora={"r": 8})`: a pipeline on a slice of the default data with a random tiny base."""

    def go(*pipelines, base="qwen2_vl", env=None, **changes):
        parameters = {**SLICE, "base_model": str(base_path(base)), "device": "cpu"}
        for key, value in changes.items():
            old = parameters.get(key)
            parameters[key] = {**old, **value} if isinstance(old, dict) else value
        with KedroSession.create(project_path=project, env=env, runtime_params=parameters) as session:
            return session.run(pipeline_names=list(pipelines))

    return go


@pytest.fixture
def once(project, tmp_path_factory):
    """`once("trained", make)`: the project's first runs. Made by the first test that asks, copied for the others."""

    def go(name, make):
        data = project / "data"
        assert not data.exists()

        def keep(folder):
            make()
            shutil.copytree(data, folder)

        kept = made_once(tmp_path_factory.getbasetemp(), f"data of {name}", keep)
        if not data.exists():
            shutil.copytree(kept, data)

    return go


@pytest.fixture
def run(project, fresh_run, once):
    """As `fresh_run`; a project that begins with `run("data_engineering")` gets what an earlier one made by it."""

    def go(*pipelines, **options):
        if pipelines == ("data_engineering",) and not options and not (project / "data").exists():
            return once("the default slice", lambda: fresh_run("data_engineering"))
        return fresh_run(*pipelines, **options)

    return go


@pytest.fixture
def evaluated(run, once):
    """The default data, an adapter of them, and its evaluation, with `SMALL`."""

    def make():
        run("data_engineering")
        run("training", "evaluation", **SMALL)

    once("trained and evaluated", make)


@pytest.fixture
def newest(project):
    """`newest("06_models/tiny/adapter")`: path of the newest version below `data/`."""

    def find(path):
        folder = project / "data" / path
        versions = sorted(folder.iterdir())
        assert versions, folder
        return versions[-1] / folder.name

    return find
