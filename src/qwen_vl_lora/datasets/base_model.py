"""The `base_model` catalog entry: a read-only handle on a directory or on a snapshot from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError

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
      filepath: data/06_models/tiny_qwen2_vl
    ```

    ```python
    BaseModelDataset(filepath="Qwen/Qwen2-VL-2B-Instruct@master").load().fingerprint
    ```
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._filepath = filepath
        repository = None if Path(filepath).is_dir() else parse_repository("model", filepath)
        self._snapshot = Snapshot(repository) if repository else None
        # One handle for all nodes of a run: its fingerprint is then computed once.
        self._handle: BaseModel | None = None

    def load(self) -> BaseModel:
        if self._handle is None:
            path = self._snapshot.fetch() if self._snapshot else Path(self._filepath)
            self._handle = self._handle_on(path)
        self._handle.check()
        return self._handle

    def check(self) -> None:
        """Refuse an unusable base before any node runs. Downloads nothing.

        Raises:
            MissingArtifactError: when a directory is not there, or neither snapshot nor hub.
            BaseModelError: when what is there cannot be used.
        """
        if self._snapshot is None:
            self._handle_on(Path(self._filepath)).check()
        elif self._snapshot.faults() == []:
            self._handle_on(self._snapshot.folder).check()
        else:
            self._snapshot.check()

    def save(self, data: None) -> NoReturn:
        raise DatasetError("The base model is read-only.")

    def _handle_on(self, path: Path) -> BaseModel:
        revision = self._snapshot.repository.revision if self._snapshot else None
        name = self._snapshot.repository.id if self._snapshot else self._filepath
        return BaseModel(name=name, path=path, revision=revision)

    def _exists(self) -> bool:
        if self._snapshot is None:
            return Path(self._filepath).is_dir()
        return self._snapshot.faults() == []

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath}
