"""Stored image features on disk: content-addressed safetensors shards, one folder per key.

`image_features/<key>/key.json` has the content of the key; `image_features/<key>/<sha256>.safetensors` has the
features of some pictures, and its name is the hash of the file.

A shard's tensors are named by the sha256 of the picture's bytes, so the shards' headers are the
index. Shards are added complete, by rename; two runs that encode at once store a picture twice at
worst.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.runs.storage import file_sha256, move, write_whole

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SHARD_SUFFIX = ".safetensors"
KEY_FILE = "key.json"


@dataclass(frozen=True)
class StagedShards:
    """Shards in the workspace, ready to be published under their key.

    Attributes:
        key: of their features; None if features are not stored (`vision: adapted`).
        paths: shard files, named by their hash.
    """

    key: FeatureKey | None
    paths: tuple[Path, ...]


class ImageFeatures:
    """The features of one key, read on demand and memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard_of = {
            name: path for path in sorted(folder.glob(f"*{SHARD_SUFFIX}")) for name in _tensor_names(path)
        }
        self._open: dict[Path, object] = {}

    @property
    def key(self) -> str:
        """Digest of the key."""
        return self.folder.name

    def __contains__(self, sha256: object) -> bool:
        return sha256 in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def get(self, sha256: str) -> torch.Tensor:
        """Features of one picture in its family's form: ([feature levels,] image tokens, hidden size).

        Raises:
            MissingArtifactError: if the picture was not encoded for this key.
        """
        from safetensors import safe_open

        path = self._shard_of.get(sha256)
        if path is None:
            raise MissingArtifactError(
                f"No stored features for picture {sha256} in {self.folder}. "
                "Run the pipeline from encode_images on: kedro run --from-nodes encode_images."
            )
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: torch.Tensor = self._open[path].get_tensor(sha256)  # type: ignore[attr-defined]
        return tensor

    def missing(self, sha256s: Iterable[str]) -> list[str]:
        """Those pictures that have no features yet, in order."""
        return [sha256 for sha256 in sha256s if sha256 not in self]


class FeatureStore:
    """The folder of all keys, the value of the `image_features` dataset."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: FeatureKey) -> Path:
        return self.root / key.digest

    def features(self, key: FeatureKey) -> ImageFeatures:
        """All features stored for `key`; may be empty."""
        return ImageFeatures(self.folder(key))

    def superseded_parts(self, key: FeatureKey) -> list[str]:
        """The parts of `key` that an upgrade changed since features were stored for the same base and settings."""
        for file in self.root.glob(f"*/{KEY_FILE}"):
            with contextlib.suppress(ValueError, OSError, AttributeError):
                parts = key.superseded_parts(json.loads(file.read_text(encoding="utf-8")))
                if parts:
                    return parts
        return []

    def drop_damaged(self, key: FeatureKey) -> None:
        """Remove shards whose hash differs from their name. Their pictures are encoded again."""
        for path in sorted(self.folder(key).glob(f"*{SHARD_SUFFIX}")):
            if file_sha256(path) != path.stem:
                logger.warning("Stored features %s are damaged; their pictures are encoded again.", path)
                path.unlink(missing_ok=True)

    def publish(self, staged: StagedShards) -> None:
        """Move staged shards into the store."""
        if staged.key is None:
            return
        folder = self.folder(staged.key)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / KEY_FILE, json.dumps(asdict(staged.key), indent=2), sync=False)
        for path in staged.paths:
            try:
                move(path, folder / path.name)
            except FileNotFoundError:  # another run that staged in the same workspace published it first
                if not (folder / path.name).is_file():
                    raise


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:  # "pt" would import torch to read names
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        logger.warning("Stored features %s cannot be read (%s); their pictures are encoded again.", path, error)
        return []
