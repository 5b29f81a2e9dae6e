"""The `workspace` catalog entry: where long work keeps what it has so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

from qwen_vl_lora.samples.image_store import files_folder
from qwen_vl_lora.samples.workspace import Workspace


class WorkspaceDataset(AbstractDataset[None, Workspace]):
    """A directory for checkpoints, shards in the making and staged outputs; untracked and unversioned.

    A run's catalog tells it by `know` where the artifacts lie that are made there.

    ```yaml
    workspace:
      type: qwen_vl_lora.datasets.workspace.WorkspaceDataset
      filepath: data/09_workspace/tiny
    ```

    ```python
    context.catalog["workspace"].load().path
    ```
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._path = Path(filepath)
        self._workspace: Workspace | None = None

    def know(self, places: Mapping[str, Path], project: Path) -> None:
        """Take over where a catalog keeps the other artifacts.

        Args:
            places: of `places_in`.
        """
        if {"images", "image_features", "adapter"} <= places.keys():
            images = files_folder(places["images"])
            self._workspace = Workspace(self._path, project, images, places["image_features"], places["adapter"])

    def places(self) -> Workspace:
        """The workspace, without making its folder."""
        if self._workspace is None:
            raise DatasetError(
                "The workspace must know where the catalog keeps `images`, `image_features` and `adapter`. Load it "
                "from the catalog of a Kedro session, in which each of them has a filepath."
            )
        return self._workspace

    def load(self) -> Workspace:
        workspace = self.places()
        self._path.mkdir(parents=True, exist_ok=True)
        return workspace

    def describe_artifact(self, name: str, data: Workspace, root: Path) -> None:
        """A run record says nothing of it: what comes of it stands under the datasets that publish it."""

    def save(self, data: None) -> NoReturn:
        raise DatasetError("The workspace is an input only.")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._path.as_posix()}


def places_in(entry: Callable[[str], Mapping[str, Any] | None], project: Path) -> dict[str, Path]:
    """Where `images`, `image_features`, `adapter` and `workspace` are kept; without those that have no filepath.

    Args:
        entry: gives a name's entry in the configuration of a catalog.
    """
    named = {name: (entry(name) or {}).get("filepath") for name in ("images", "image_features", "adapter", "workspace")}
    return {name: project / path for name, path in named.items() if path}
