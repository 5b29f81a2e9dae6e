"""The notebooks run from top to bottom on a finished run, and are kept without outputs."""

import shutil
from pathlib import Path

import pytest

from finished_project import finished_project

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_both_notebooks_are_there():
    assert [path.name for path in NOTEBOOKS] == ["compare_and_try.ipynb", "explore_captions.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(path, tmp_path_factory, base_path):
    pytest.importorskip("ipykernel")
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    (project / "notebooks").mkdir(exist_ok=True)
    shutil.copy(path, project / "notebooks")
    notebook = nbformat.read(project / "notebooks" / path.name, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, resources={"metadata": {"path": str(project / "notebooks")}}
    )
    client.execute()
    shown = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert "image/png" in shown
    assert "text/html" in shown
