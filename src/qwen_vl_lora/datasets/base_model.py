"""The `base_model` catalog entry: a read-only handle on a directory or on a snapshot from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from kedro.io import AbstractDataset, DatasetError
from kedro.utils import find_kedro_project
from kedro_datasets._typing import TablePreview

from qwen_vl_lora.hub.repositories import HUBS, parse_repository
from qwen_vl_lora.hub.snapshots import snapshot_of
from qwen_vl_lora.model import shipped_base
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.fingerprints import stored_tensors
from qwen_vl_lora.runs.artifacts import relative
from qwen_vl_lora.runs.run import Artifact


class BaseModelDataset(AbstractDataset[None, BaseModel]):
    """A model of a supported family: a local directory, or `owner/name@revision` on a hub.

    `hf:owner/name` is on Hugging Face, `ms:owner/name` on ModelScope, and a name without a prefix on `hub`. A
    directory that is there wins. A model of the hub is downloaded when it is first loaded and is
    used from then on without a network.

    ```yaml
    base_model:
      type: qwen_vl_lora.datasets.base_model.BaseModelDataset
      model: Qwen/Qwen2-VL-2B-Instruct@master   # or hf:Qwen/Qwen2-VL-2B-Instruct, or data/06_models/tiny_qwen2_vl
    ```

    ```python
    BaseModelDataset(model="Qwen/Qwen2-VL-2B-Instruct@master").load().fingerprint
    ```
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        filepath: str | None = None,
        hub: str = "modelscope",
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Give `model`, or `filepath` for a directory: Kedro turns a `filepath` into an absolute path.

        Args:
            hub: `modelscope` or `huggingface`, of a name without a prefix.
        """
        named = model or filepath
        if not named or (model and filepath):
            raise DatasetError(f"base_model needs model or filepath, one of the two; came {model=} and {filepath=}.")
        if hub not in HUBS:
            raise DatasetError(f"base_model: hub must be {' or '.join(HUBS)}; got {hub!r}. Set hub in globals.yml.")
        self.metadata = metadata
        self._model = named
        # `model` is no path to Kedro, which would make it absolute; a command or notebook may run in a subfolder.
        self._folder = (find_kedro_project(Path.cwd()) or Path.cwd()) / Path(named).expanduser()
        if named == shipped_base.PLACE:
            shipped_base.unpack(self._folder)
        repository = None if self._folder.is_dir() else parse_repository("model", named, HUBS[hub])
        if repository is None and named.startswith(("hf:", "ms:")):
            raise DatasetError(
                f"base_model: expected {named[:3]}owner/name or {named[:3]}owner/name@revision; got {named!r}."
            )
        self._snapshot = snapshot_of(repository) if repository else None
        # One handle for all nodes of a run: its fingerprint is then computed once.
        self._handle: BaseModel | None = None

    def load(self) -> BaseModel:
        if self._handle is None:
            is_new = self._snapshot is not None and not self._snapshot.is_whole()
            handle = self._handle_on(self._snapshot.fetch() if self._snapshot else self._folder)
            handle.check()
            if is_new:  # the look before the run had nothing to look at
                handle.check_loads()
            self._handle = handle
        return self._handle

    def check(self) -> None:
        """Refuse an unusable base before any node runs. Downloads nothing and reads no weights.

        Raises:
            MissingArtifactError: when a directory is not there, or neither snapshot nor hub.
            BaseModelError: when what is there cannot be used.
        """
        if self._snapshot is None or self._snapshot.is_whole():
            handle = self._handle_on(self._snapshot.folder if self._snapshot else self._folder)
            handle.check()
            handle.check_loads()
        else:
            self._snapshot.check()

    def needs_network(self) -> bool:
        """Whether a load, and so a check, asks the hub."""
        return not self._exists() and self._snapshot is not None

    def describe_artifact(self, name: str, data: BaseModel, root: Path) -> Artifact:
        """The line in a run record: revision, place and fingerprint of what was loaded."""
        return {
            "version": data.revision,
            "path": relative(data.path, root),
            "sha256": data.fingerprint,
            "files": data.files,
        }

    def preview(self) -> TablePreview:
        """Read from config.json and the weights' headers. Downloads nothing: looking must not cost 15 GB."""
        if not self._exists():
            return fact_table({**self._describe(), "state": "not here yet; the first run that needs it fetches it"})
        return fact_table(model_facts(self.load()))

    def save(self, data: None) -> NoReturn:
        raise DatasetError("The base model is read-only.")

    def _handle_on(self, path: Path) -> BaseModel:
        revision = self._snapshot.repository.revision if self._snapshot else None
        name = self._snapshot.repository.name if self._snapshot else self._model
        return BaseModel(name=name, path=path.absolute(), revision=revision)

    def _exists(self) -> bool:
        if self._snapshot is None:
            return self._folder.is_dir()
        return self._snapshot.is_whole()

    def _describe(self) -> dict[str, Any]:
        return {"model": self._model}


def model_facts(model: BaseModel) -> dict[str, Any]:
    """Family, shape and size of a model on disk, without its weights in memory."""
    text, vision = model.config.get("text_config", model.config), model.config["vision_config"]
    tensors = [tensor for path in model.weight_files for tensor in stored_tensors(path)]
    dtypes = sorted({tensor.dtype for tensor in tensors})
    return {
        "name": model.name,
        "revision": model.revision or "none: a plain folder",
        "family": model.family.model_type,
        "parameters": f"{sum(prod(tensor.shape) for tensor in tensors) / 1e6:,.1f} million",
        "stored as": f"{', '.join(dtypes)}, {sum(t.stop - t.start for t in tensors) / 2**20:,.1f} MiB",
        "language model": f"{text['num_hidden_layers']} layers of {text['hidden_size']}",
        "vision tower": f"{vision['depth']} layers",
        "vocabulary": f"{text['vocab_size']:,}",
    }


def fact_table(facts: Mapping[str, Any]) -> TablePreview:
    """Names and values, a row each."""
    rows = [[name, str(value)] for name, value in facts.items()]
    return TablePreview({"index": list(range(len(rows))), "columns": ["fact", "value"], "data": rows})
