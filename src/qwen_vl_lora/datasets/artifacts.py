"""Versioned artifacts that are whole or absent, and the wrapper that makes stock Kedro datasets so.

A save goes to a hidden sibling folder, reaches the disk, and becomes visible by one rename.
A run reads back the version it wrote itself, whatever other runs write meanwhile.
"""

from __future__ import annotations

import inspect
import shutil
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from kedro.io import AbstractDataset, AbstractVersionedDataset, DatasetError, Version
from kedro.io.core import VersionNotFoundError, parse_dataset_definition

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.artifacts import describe_artifact
from qwen_vl_lora.runs.records import runs_around, sorted_by_making
from qwen_vl_lora.runs.run import Artifact
from qwen_vl_lora.runs.storage import make_folder, replace, sync_folder, sync_tree, temporary


class AtomicVersionedDataset(AbstractVersionedDataset[Any, Any]):
    """A file or directory that appears by rename.

    Subclasses write to and read from a plain path and need not know of versions. Works
    unversioned too; replacing a directory then takes two renames.
    """

    def __init__(self, filepath: str, version: Version | None = None, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(filepath=PurePosixPath(filepath), version=version)
        self.metadata = metadata
        self._own_version: str | None = None

    @abstractmethod
    def _read(self, path: Path) -> Any:
        """The value stored at `path`, which exists."""

    @abstractmethod
    def _write(self, data: Any, path: Path) -> None:
        """Store `data` at `path`, which does not exist and whose folder is new and empty."""

    def load(self) -> Any:
        return self._read(self.existing_path())

    def save(self, data: Any) -> None:
        target = Path(self._get_save_path())
        with _staging_folder(Path(self._filepath)) as staging:
            self._write(data, staging / target.name)
            sync_tree(staging)
            if self._version:
                make_folder(target.parent.parent)
                _publish_version(staging, target.parent)
            else:
                replace(staging / target.name, target)
        self._own_version = self.resolve_save_version()

    def existing_path(self) -> Path:
        """Path of the version that a load reads.

        Raises:
            MissingArtifactError: with the versions that are there and how to make one.
        """
        try:
            path = Path(self._get_load_path())
        except VersionNotFoundError:
            path = None
        if path is not None and path.exists():
            return path
        wanted = f"version {self._version.load} " if self._version and self._version.load else ""
        versions = ", ".join(reversed(self.versions())) or "none"
        raise MissingArtifactError(
            f"{wanted}{'of ' if wanted else ''}{self._filepath} not found (versions found: {versions}). "
            "Run the pipeline that writes it (`kedro registry describe` shows which), or `kedro run` for all."
        )

    def describe_artifact(self, name: str, data: Any, root: Path) -> Artifact | None:
        """The line in a run record: version, place below `root` and hashes of what was loaded or saved."""
        return describe_artifact(name, self.existing_path(), root, self.resolve_load_version())

    def pin(self, version: str) -> None:
        """Read this version, unless the run writes one of its own."""
        self._version = Version(version, self._version.save if self._version else None)

    @property
    def pinned_version(self) -> str | None:
        """The version that the user named, or that `pin` chose."""
        return self._version.load if self._version else None

    def versions(self) -> list[str]:
        """Versions that are there, newest first; empty for an unversioned entry."""
        return self.list_versions(full_path=False) if self._version else []

    def _get_versions(self) -> list[str]:
        """Kedro sorts by name, which is the clock's word; the order of making is the run records'."""
        paths = {PurePosixPath(path).parent.name: path for path in super()._get_versions()}
        return [paths[name] for name in sorted_by_making(paths, runs_around(Path(self._filepath)))]

    def resolve_load_version(self) -> str | None:
        """The version this instance wrote, else the pinned one, else the newest."""
        return self._own_version or super().resolve_load_version()

    def _exists(self) -> bool:
        return Path(self._get_load_path()).exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._filepath, "version": self._version}


class ArtifactDataset(AtomicVersionedDataset):
    """Any stock Kedro dataset, saved whole or not at all.

    ```yaml
    caption_table:
      type: qwen_vl_lora.datasets.artifacts.ArtifactDataset
      dataset: {type: pandas.CSVDataset, save_args: {index: false}}
      filepath: data/02_intermediate/tiny/caption_table.csv
      versioned: true
    ```

    ```python
    ArtifactDataset(filepath="metrics.json", dataset={"type": "json.JSONDataset"}).save({"CIDEr": 8.2})
    ```

    The stock dataset's preview in Kedro-Viz is kept.
    """

    def __init__(
        self,
        filepath: str,
        dataset: dict[str, Any] | str,
        version: Version | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(filepath, version, metadata)
        self._config = {"type": dataset} if isinstance(dataset, str) else dict(dataset)
        stock_class, _ = parse_dataset_definition({**self._config, "filepath": filepath})
        self._fs_args = _utf8(stock_class, self._config.get("fs_args") or {})
        if hasattr(stock_class, "preview"):
            self.preview = self._preview_like(stock_class)

    def _stock(self, path: Path) -> AbstractDataset[Any, Any]:
        texts = {"fs_args": self._fs_args} if self._fs_args else {}
        return AbstractDataset.from_config("artifact", {**self._config, **texts, "filepath": path.as_posix()})

    def _read(self, path: Path) -> Any:
        return self._stock(path).load()

    def _write(self, data: Any, path: Path) -> None:
        self._stock(path).save(data)

    def _preview_like(self, stock_class: Any) -> Any:
        def preview(**arguments: Any) -> Any:
            return self._stock(self.existing_path()).preview(**arguments)  # type: ignore[attr-defined]

        # Kedro-Viz picks its renderer from the return annotation.
        signature = inspect.signature(stock_class.preview)
        parameters = list(signature.parameters.values())[1:]
        preview.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return preview

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "dataset": self._config}


def _utf8(stock_class: Any, fs_args: Any) -> dict[str, Any]:
    """`fs_args` by which a stock dataset's text files are UTF-8, whatever the locale; an encoding in them stays."""
    defaults = getattr(stock_class, "DEFAULT_FS_ARGS", {})
    opened = {
        name: {**defaults.get(name, {}), **fs_args.get(name, {})} for name in ("open_args_load", "open_args_save")
    }
    texts = {
        name: {"encoding": "utf-8", **given} for name, given in opened.items() if "b" not in given.get("mode", "rb")
    }
    return {**fs_args, **texts}


@contextmanager
def _staging_folder(filepath: Path) -> Iterator[Path]:
    """A new hidden folder beside `filepath`, where no version glob finds it; gone afterwards."""
    staging = temporary(filepath)
    staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish_version(staging: Path, version_folder: Path) -> None:
    try:
        staging.rename(version_folder)
    except OSError as error:
        if version_folder.exists():
            raise DatasetError(
                f"Version {version_folder.name} of {version_folder.parent} was written by another run in the same "
                "millisecond. Nothing was lost; start this run again."
            ) from error
        raise
    sync_folder(version_folder.parent)
