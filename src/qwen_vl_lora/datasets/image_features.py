"""The `image_features` catalog entry: the store of encoded pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from qwen_vl_lora.features.store import SHARD_SUFFIX, FeatureStore, StagedShards
from qwen_vl_lora.runs.artifacts import digest, relative
from qwen_vl_lora.runs.run import Artifact


class ImageFeaturesDataset(AbstractDataset[StagedShards, FeatureStore]):
    """Content-addressed shards: saving adds new ones by rename, loading gives the whole store.

    Unversioned on purpose: a feature is a pure function of its key and the picture's bytes.

    ```yaml
    image_features:
      type: qwen_vl_lora.datasets.image_features.ImageFeaturesDataset
      filepath: data/04_feature/tiny/image_features
    ```

    ```python
    ImageFeaturesDataset(filepath="data/04_feature/tiny/image_features").load().features(key)
    ```
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self.metadata = metadata
        self._store = FeatureStore(Path(filepath))

    def load(self) -> FeatureStore:
        return self._store

    def save(self, data: StagedShards) -> None:
        self._store.publish(data)

    def describe_artifact(self, name: str, data: FeatureStore | StagedShards, root: Path) -> Artifact:
        """The line in a run record: which shards of which keys. How pictures are spread over them says nothing of them.

        Of staged shards those of their key, of the store all.
        """
        keys = "*" if isinstance(data, FeatureStore) else data.key.digest if data.key is not None else None
        shards = [] if keys is None else sorted(self._store.root.glob(f"{keys}/*{SHARD_SUFFIX}"))
        files = {f"{shard.parent.name}/{shard.name}": shard.stem for shard in shards}
        return {
            "version": None,
            "path": relative(self._store.root, root),
            "keys": sorted({shard.parent.name for shard in shards}),
            "sha256": digest(files),
            "content_sha256": None,
            "files": files,
        }

    def _exists(self) -> bool:
        return self._store.root.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self._store.root.as_posix()}
