"""One finished default run on a slice with a random tiny base; each caller gets a copy of its own."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from made_once import made_once

PROJECT = Path(__file__).parents[1]
SLICE = {
    "captions": {"num_rows": 60},
    "split": {"test_images": 12, "validation_images": 4},
    "training_args": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_steps": 4},
    "generation": {"max_new_tokens": 6},
    "scoring": {"bootstrap_samples": 10},
    "device": "cpu",
}


def finished_project(root: Path, base: Path) -> Path:
    """A project below `root` whose catalog holds everything that `kedro run` writes, for the caller alone.

    The run is made once for all test processes.

    Args:
        root: pytest's base temporary folder.
        base: the base model's directory; it is copied to where the default configuration reads it.
    """
    made = made_once(root, "finished", lambda project: _run_all(project, base))
    return shutil.copytree(made, Path(tempfile.mkdtemp(prefix="finished_", dir=root)) / "project")


def _run_all(project: Path, base: Path) -> None:
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    shutil.copytree(PROJECT / "conf", project / "conf")
    shutil.copytree(base, project / "data" / "06_models" / "tiny_qwen2_vl")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, project)
    (project / ".viz").mkdir()
    shutil.copy(PROJECT / ".viz" / "styles.json", project / ".viz")
    (project / "src").mkdir()  # the package itself is installed
    with contextlib.chdir(project):
        bootstrap_project(project)
        with KedroSession.create(project_path=project, runtime_params=SLICE) as session:
            session.run()
