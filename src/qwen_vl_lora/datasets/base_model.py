"""The `base_model` catalog entry: a read-only handle on a directory or on a snapshot from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError
from kedro.utils import find_kedro_project

from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.hub.snapshots import Snapshot
from qwen_vl_lora.modeling.base_model import BaseModel


class BaseModelDataset(AbstractDataset[None, BaseModel]):
    """A Qwen2-VL or Qwen2.5-VL model: a local directory, or `owner/name@revision` on ModelScope.

    A directory that is there wins. A model of the hub is downloaded when it is first loaded and is
    used from then on without a network.

    ```yaml
    base_model:
      type: qwen_vl_lora.datasets.base_model.BaseModelDataset
      model: Qwen/Qwen2-VL-2B-Instruct@master   # or data/06_models/tiny_qwen2_vl
    ```

    ```python
    BaseModelDataset(model="Qwen/Qwen2-VL-2B-Instruct@master").load().fingerprint
    ```
    """

    def __init__(
        self, *, model: str | None = None, filepath: str | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        """Give `model`, or `filepath` for a directory: Kedro turns a `filepath` into an absolute path."""
        named = model or filepath
        if not named or (model and filepath):
            raise DatasetError(f"base_model needs model or filepath, one of the two; came {model=} and {filepath=}.")
        self.metadata = metadata
        self._model = named
        # `model` is no path to Kedro, which would make it absolute; a command or notebook may run in a subfolder.
        self._folder = (find_kedro_project(Path.cwd()) or Path.cwd()) / Path(named).expanduser()
        repository = None if self._folder.is_dir() else parse_repository("model", named)
        self._snapshot = Snapshot(repository) if repository else None
        # One handle for all nodes of a run: its fingerprint is then computed once.
        self._handle: BaseModel | None = None

    def load(self) -> BaseModel:
        if self._handle is None:
            path = self._snapshot.fetch() if self._snapshot else self._folder
            self._handle = self._handle_on(path)
        self._handle.check()
        return self._handle

    def check(self) -> None:
        """Refuse an unusable base before any node runs. Downloads nothing.

        Raises:
            MissingArtifactError: when a directory is not there, or neither snapshot nor hub.
            BaseModelError: when what is there cannot be used.
        """
        if self._snapshot is None or self._snapshot.is_whole():
            self._handle_on(self._snapshot.folder if self._snapshot else self._folder).check()
        else:
            self._snapshot.check()

    def save(self, data: None) -> NoReturn:
        raise DatasetError("The base model is read-only.")

    def _handle_on(self, path: Path) -> BaseModel:
        revision = self._snapshot.repository.revision if self._snapshot else None
        name = self._snapshot.repository.id if self._snapshot else self._model
        return BaseModel(name=name, path=path.absolute(), revision=revision)

    def _exists(self) -> bool:
        if self._snapshot is None:
            return self._folder.is_dir()
        return self._snapshot.is_whole()

    def _describe(self) -> dict[str, Any]:
        return {"model": self._model}
