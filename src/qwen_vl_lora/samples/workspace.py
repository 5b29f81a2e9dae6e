"""The workspace of a recipe. Only collect_samples, encode_images and train_adapter write there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Where long work keeps what it has so far, and where the catalog keeps what it needs to know of.

    Attributes:
        path: of the workspace itself.
        project: the folder that paths in artifacts are relative to.
        images: the folder that holds the bytes of the pictures of `images`.
        feature_store: root of the published `image_features`, read so that encoding grows by new pictures only.
        adapters: the folder that holds the versions of `adapter`.
    """

    path: Path
    project: Path
    images: Path
    feature_store: Path
    adapters: Path

    def folder(self, name: str) -> Path:
        """Return a directory below `path`; create it if needed."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
