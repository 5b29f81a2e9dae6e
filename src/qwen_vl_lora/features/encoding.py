"""Runs the frozen vision tower once per distinct picture.

Finished shards are kept in the workspace, so a killed run resumes where it stopped.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qwen_vl_lora.cluster.work import Processes
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import SHARD_SUFFIX, FeatureStore, ImageFeatures, StagedShards
from qwen_vl_lora.features.tower import Encoder
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import ONE_PROCESS, ClusterParameters, ImageParameters
from qwen_vl_lora.runs.run import recorded_work
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.samples.image_store import ImageStore

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def encode_pictures(
    images: ImageStore,
    base_model: BaseModel,
    image: ImageParameters,
    dtype: str,
    device: torch.device,
    store: FeatureStore,
    staging: Path,
    cluster: ClusterParameters = ONE_PROCESS,
) -> StagedShards:
    """Encode the pictures that have no stored features yet.

    Args:
        images: all pictures of the run.
        staging: folder in the workspace for finished shards, one per key.
        cluster: how many processes share the work.

    Returns:
        The new shards, still in `staging`; their union with the store covers `images`.
    """
    key = FeatureKey.of(base_model, image.size, dtype)
    staging = staging / key.digest
    staging.mkdir(parents=True, exist_ok=True)
    store.drop_damaged(key)
    _drop_damaged_leftovers(staging)
    wanted = store.features(key).missing(entry.sha256 for entry in images)
    wanted = ImageFeatures(staging).missing(wanted)
    if wanted:
        if len(wanted) == len(images) and (parts := store.superseded_parts(key)):
            logger.info("Features stored by an older version (other %s) are not used.", ", ".join(parts))
        logger.info("Encoding %d of %d pictures; the others are stored.", len(wanted), len(images))
        encoder = Encoder(images, base_model, image, dtype, device, staging)
        with (
            recorded_work("encode_images", "pictures") as work,
            tqdm(total=len(wanted), desc="encode_images", unit="image", leave=False, disable=None) as bar,
        ):
            for done in Processes(cluster, device).in_pieces(encoder, encoder.pieces(wanted)):
                work.add(done.result, done.process)
                bar.update(done.result)
    else:
        logger.info("All %d pictures are encoded already.", len(images))
    return StagedShards(key, tuple(sorted(staging.glob(f"*{SHARD_SUFFIX}"))))


def _drop_damaged_leftovers(staging: Path) -> None:
    """Remove finished shards that a power loss damaged. Partial ones may belong to another process."""
    for path in staging.glob(f"*{SHARD_SUFFIX}"):
        if file_sha256(path) != path.stem:
            path.unlink(missing_ok=True)
