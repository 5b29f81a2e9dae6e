"""The workspace's handle names the places that the catalog gives."""

import pytest
from kedro.framework.session import KedroSession
from kedro.io import DatasetError

from pipelines.conftest import project  # noqa: F401
from qwen_vl_lora.datasets.workspace import WorkspaceDataset


def test_its_places_are_those_of_the_catalog_of_the_session(project):  # noqa: F811
    with KedroSession.create(project_path=project, runtime_params={"recipe": "mine"}) as session:
        workspace = session.load_context().catalog["workspace"].load()
    assert workspace.project == project
    assert [place.relative_to(project).as_posix() for place in (workspace.path, workspace.images)] == [
        "data/09_workspace/mine",
        "data/02_intermediate/mine/images/files",
    ]
    assert workspace.feature_store == project / "data/04_feature/mine/image_features"
    assert workspace.adapters == project / "data/06_models/mine/adapter"
    assert workspace.path.is_dir()


def test_outside_of_a_session_it_says_that_it_does_not_know_them(tmp_path):
    with pytest.raises(DatasetError, match="from the catalog of a Kedro session"):
        WorkspaceDataset(filepath=str(tmp_path)).load()
