"""Captions in a data set on a hub. The hub's listing selects the source; files are downloaded as rows are read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.hub.data_files import DataRepository, HubFolder
from qwen_vl_lora.samples.columnar import STATE_FILES
from qwen_vl_lora.samples.folders import TAR_SUFFIXES, open_files
from qwen_vl_lora.samples.records import Row, SourceSample
from qwen_vl_lora.samples.source import Source
from qwen_vl_lora.samples.sources import CaptionsFile


@dataclass(frozen=True)
class HubData(Source):
    """A data set by name and revision. The first rows download only the files that contain them.

    Attributes:
        below: a file or folder in the data set; empty for all of it.
        image_folder: local folder for relative paths of pictures, instead of the data set.
    """

    repository: DataRepository
    below: str = ""
    image_folder: Path | None = None

    def __str__(self) -> str:
        return f"{self.repository}:{self.below}" if self.below else str(self.repository)

    @property
    def folders(self) -> tuple[Path, ...]:
        own = self.repository.folder
        return (own,) if self.image_folder is None else (self.image_folder.absolute(), own)

    @property
    def is_local(self) -> bool:
        return False

    def check(self) -> None:
        """Refuse files that are not captions, and an unreachable hub if the first file is not on this machine."""
        folder = self.repository.open()
        self._open(folder)
        chosen = [path for path in folder.paths if self._is_below(folder, path)]
        if not any(map(folder.is_here, chosen)):
            self.repository.require_reachable()

    def __iter__(self) -> Iterator[Row]:
        folder = self.repository.open()
        for row in self._open(folder).brought_by(folder.bring).read_as(self.reading):
            if isinstance(row, SourceSample):
                for image in row.images:
                    if isinstance(image, Path):
                        folder.bring(Path(os.path.normpath(image)))
            yield row

    def _open(self, folder: HubFolder) -> Source:
        paths = [path for path in folder.paths if self._is_below(folder, path)]
        if not paths:
            raise MissingArtifactError(
                f"{self.repository} has no file {self.below or 'at all'}. Check its files on the hub."
            )
        root = folder.folder / self.below
        if folder.holds(root):
            if root.suffix.lower() not in (".parquet", ".arrow") and not root.name.lower().endswith(TAR_SUFFIXES):
                return CaptionsFile(root, self.image_folder)
            return open_files(root.parent, [root], self.image_folder)
        for path in paths:
            if path.parent == root and path.name in STATE_FILES:
                folder.bring(path)
        return open_files(root, sorted(paths), self.image_folder)

    def _is_below(self, folder: HubFolder, path: Path) -> bool:
        return path.is_relative_to(folder.folder / self.below)
