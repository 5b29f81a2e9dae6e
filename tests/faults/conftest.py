"""Projects whose training can be killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from faults.killing import Killable

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def killable(tmp_path_factory, base_path):
    """`killable(training_args={…})`: a project with data; with `folder`, one more process in an old one."""
    made = []

    def make(folder=None, **changes):
        if folder is not None:
            made.append(Killable(folder, base_path("qwen2_vl"), **changes))
            return made[-1]
        folder = tmp_path_factory.mktemp("killable")
        shutil.copytree(PROJECT / "conf", folder / "conf")
        shutil.copy(PROJECT / "pyproject.toml", folder)
        (folder / "src").mkdir()
        project = Killable(folder, base_path("qwen2_vl"), **changes)
        made.append(project)
        bootstrap_project(folder)
        with KedroSession.create(project_path=folder, runtime_params=project.params) as session:
            session.run(pipeline_names=["data_engineering"])
        return project

    yield make
    for project in made:
        project.close()
