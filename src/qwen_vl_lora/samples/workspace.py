"""The handle on a recipe's workspace. Only collect_samples, encode_images and train_adapter write there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Where long work keeps what it has so far.

    Attributes:
        path: `<project>/data/09_workspace/<recipe>`; on the filesystem of the other data folders, so that
            publishing is a rename.
    """

    path: Path

    @property
    def feature_store(self) -> Path:
        """Root of the recipe's published image features, read so that encoding grows by new pictures only."""
        return self.path.parents[1] / "04_feature" / self.path.name / "image_features"

    def folder(self, name: str) -> Path:
        """A directory below `path`, made when it is not there."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
