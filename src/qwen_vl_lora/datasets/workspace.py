"""The `workspace` catalog entry: where long work keeps what it has so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from qwen_vl_lora.samples.workspace import Workspace


class WorkspaceDataset(AbstractDataset[None, Workspace]):
    """A directory for checkpoints, shards in the making and staged outputs; untracked and unversioned.

    ```yaml
    workspace:
      type: qwen_vl_lora.datasets.workspace.WorkspaceDataset
      filepath: data/09_workspace/tiny
    ```

    ```python
    WorkspaceDataset(filepath="data/09_workspace/tiny").load().path
    ```
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._workspace = Workspace(Path(filepath))

    def load(self) -> Workspace:
        self._workspace.path.mkdir(parents=True, exist_ok=True)
        return self._workspace

    def save(self, data: None) -> NoReturn:
        raise DatasetError("The workspace is an input only.")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._workspace.path.as_posix()}
