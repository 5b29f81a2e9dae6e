"""CLIPScore and RefCLIPScore of captions, by a CLIP model that the user names.

Hessel et al., CLIPScore: A Reference-free Evaluation Metric for Image Captioning (EMNLP 2021). With v, c and r the
embeddings of picture, caption and a reference:

    CLIPScore(c, v) = 2.5 · max(cos(c, v), 0)
    RefCLIPScore(c, R, v) = harmonic mean of CLIPScore(c, v) and max(max over r of cos(c, r), 0)

Texts begin with `A photo depicts `, as in the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qwen_vl_lora.evaluation.predictions import Prediction
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError
from qwen_vl_lora.faults import library_faults
from qwen_vl_lora.hub.repositories import parse_repository
from qwen_vl_lora.hub.snapshots import Snapshot, snapshot_of
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

WEIGHT = 2.5
PREFIX = "A photo depicts "
_BATCH = 32


def clip_scores(captions: Floats, pictures: Floats, references: Sequence[Floats]) -> tuple[Floats, Floats]:
    """CLIPScore and RefCLIPScore of each caption.

    Args:
        captions, pictures: embeddings of any length, (captions, dimensions).
        references: of each caption, (references, dimensions).
    """
    texts = _unit(captions)
    alone = WEIGHT * np.maximum((texts * _unit(pictures)).sum(axis=1), 0)
    nearest = [max(0.0, float((_unit(of_one) @ text).max())) for text, of_one in zip(texts, references, strict=True)]
    both = alone + np.array(nearest)
    with_references = np.divide(2 * alone * nearest, both, out=np.zeros_like(both), where=both > 0)
    return alone, with_references


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


class Clip:
    """A CLIP model and its processor.

    Raises:
        ParameterError: if the directory has no CLIP that transformers loads.

    Attributes:
        limit: tokens that a text may have; the rest is not seen.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        def in_words(said: str) -> ParameterError:
            return ParameterError(
                f"evaluation.clip_score: {folder} cannot be loaded as a CLIP model ({said}). Give a directory with "
                "config.json of model type clip, its processor's files and safetensors."
            )

        with library_faults(in_words):
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self._model.eval().to(device)
        self.limit = int(self._model.config.text_config.max_position_embeddings)
        self.truncated: set[str] = set()

    def of_texts(self, texts: Sequence[str]) -> Floats:
        """Embeddings (texts, dimensions). Notes in `truncated` which texts were longer than `limit` tokens."""
        tokenizer, parts = self._processor.tokenizer, []
        for some in _batches(texts):
            prefixed = [f"{PREFIX}{text}" for text in some]
            lengths = [len(ids) for ids in tokenizer(prefixed)["input_ids"]]
            self.truncated.update(text for text, length in zip(some, lengths, strict=True) if length > self.limit)
            inputs = tokenizer(prefixed, padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
            parts.append(self._embed(self._model.get_text_features, inputs))
        return np.concatenate(parts)

    def of_pictures(self, pictures: Sequence[Image.Image]) -> Floats:
        """Embeddings (pictures, dimensions)."""
        inputs = self._processor.image_processor(images=list(pictures), return_tensors="pt")
        return self._embed(self._model.get_image_features, inputs)

    def _embed(self, make: Any, inputs: Any) -> Floats:
        with torch.inference_mode():
            made = make(**inputs.to(self._model.device)).pooler_output
        return np.asarray(made.double().cpu().numpy())


def score_with_clip(
    predictions: Sequence[Prediction], sides: Sequence[str], images: ImageStore, clip: Clip
) -> Mapping[str, tuple[Floats, Floats]]:
    """CLIPScore and RefCLIPScore of each side's captions; NaN for a question without a picture."""
    rows = [row for row, item in enumerate(predictions) if item.image_path]
    items = [predictions[row] for row in rows]
    paths = list(dict.fromkeys(item.image_path for item in items))
    pictures = dict(zip(paths, _pictures(paths, images, clip), strict=True))
    shown = np.stack([pictures[item.image_path] for item in items])
    texts = list(dict.fromkeys(text for item in items for text in item.references))
    known = dict(zip(texts, clip.of_texts(texts), strict=True))
    references = [np.stack([known[text] for text in item.references]) for item in items]
    found = {}
    for side in sides:
        scores = clip_scores(clip.of_texts([item.written(side).caption for item in items]), shown, references)
        found[side] = (_at(rows, scores[0], len(predictions)), _at(rows, scores[1], len(predictions)))
    return found


def find_clip(named: str, project: Path) -> Path | Snapshot:
    """The directory of a CLIP, or the snapshot of a model of a hub, which is downloaded once.

    Raises:
        MissingArtifactError: if it is neither.
    """
    folder = project / Path(named).expanduser()
    if folder.is_dir():
        return folder
    repository = parse_repository("model", named) if named.startswith(("hf:", "ms:")) else None
    if repository is None:
        raise MissingArtifactError(
            f"evaluation.clip_score names {named!r}, which is not a directory. Give the path of a CLIP model, or its "
            "name on a hub, such as hf:owner/name."
        )
    return snapshot_of(repository)


def load_clip(named: str, project: Path, device: torch.device) -> Clip:
    """The CLIP that a parameter names. Raises as `find_clip` and `Clip`."""
    place = find_clip(named, project)
    return Clip(place if isinstance(place, Path) else place.fetch(), device)


def _pictures(paths: Sequence[str], images: ImageStore, clip: Clip) -> Floats:
    parts = [clip.of_pictures([images.open(images.by_path(path).sha256) for path in some]) for some in _batches(paths)]
    return np.concatenate(parts)


def _batches(whole: Sequence[str]) -> Iterator[Sequence[str]]:
    return (whole[start : start + _BATCH] for start in range(0, len(whole), _BATCH))


def _at(rows: Sequence[int], scores: Floats, count: int) -> Floats:
    spread = np.full(count, np.nan)
    spread[list(rows)] = scores
    return spread
