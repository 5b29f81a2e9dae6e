"""A copy of the project to run pipelines in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

PROJECT = Path(__file__).parents[2]
SLICE = {
    "captions": {"num_rows": 40},
    "split": {"test_images": 6, "validation_images": 4},
    "training_args": {"num_train_epochs": 1, "per_device_train_batch_size": 4, "save_steps": 2},
    "generation": {"max_new_tokens": 4},
    "scoring": {"bootstrap_samples": 10},
}


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
def run(project, base_path):
    """`run("training", lora={"r": 8})`: a pipeline on a slice of the default data with a random tiny base."""

    def go(*pipelines, base="qwen2_vl", env=None, **changes):
        parameters = {**SLICE, "base_model": str(base_path(base)), "device": "cpu"}
        for key, value in changes.items():
            old = parameters.get(key)
            parameters[key] = {**old, **value} if isinstance(old, dict) else value
        with KedroSession.create(project_path=project, env=env, runtime_params=parameters) as session:
            return session.run(pipeline_names=list(pipelines))

    return go


@pytest.fixture
def newest(project):
    """`newest("06_models/tiny/adapter")`: path of the newest version below `data/`."""

    def find(path):
        folder = project / "data" / path
        versions = sorted(folder.iterdir())
        assert versions, folder
        return versions[-1] / folder.name

    return find
