"""What captions are worth: the metrics, and what the parameters ask for beside them, a judge and CLIPScore."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qwen_vl_lora.evaluation.metrics import mean_interval, score_predictions
from qwen_vl_lora.evaluation.predictions import SIDES, Prediction, contenders_in, read_predictions
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.image_store import ImageStore

logger = logging.getLogger(__name__)


def score_table(
    table: pd.DataFrame, images: ImageStore, project: Path, settings: Parameters
) -> tuple[dict[str, Any], pd.DataFrame]:
    """`caption_metrics` and `caption_scores` of a `predictions` table.

    Args:
        project: what a path of `evaluation.clip_score` is relative to.

    Raises:
        DataFormatError: as `score_predictions`.
        ServerError: if the judge is gone or useless.
        MissingArtifactError, ParameterError: if there is no such CLIP.
    """
    metrics, scores = score_predictions(table, settings.scoring)
    predictions, sides = read_predictions(table), [*SIDES, *contenders_in(table)]
    for add in (_add_verdicts, _add_clip_scores):
        more, columns = add(predictions, sides, images, project, settings)
        metrics, scores = {**metrics, **more}, scores.assign(**columns)
    return metrics, scores


def _add_verdicts(
    predictions: Sequence[Prediction], sides: Sequence[str], images: ImageStore, _: Path, settings: Parameters
) -> tuple[dict[str, Any], dict[str, Any]]:
    judge = settings.evaluation.judge
    if not judge.addresses:
        return {}, {}
    from qwen_vl_lora.evaluation.judging import judge_captions, summarize_verdicts

    others = [side for side in sides if side != "tuned"]
    verdicts, served = judge_captions(predictions, others, images, judge)
    pictures = _pictures(predictions)
    against = {side: summarize_verdicts(found, pictures, settings.scoring) for side, found in verdicts.items()}
    if unclear := sum(each["not_judged"] for each in against.values()):
        logger.warning("The judge gave no usable answer to %d of %d pairs.", unclear, len(others) * len(predictions))
    columns = {f"judged_{side}": [verdict or "" for verdict in found] for side, found in verdicts.items()}
    return {"judge": {"model": served.model, "kind": served.kind, "against": against}}, columns


def _add_clip_scores(
    predictions: Sequence[Prediction], sides: Sequence[str], images: ImageStore, project: Path, settings: Parameters
) -> tuple[dict[str, Any], dict[str, Any]]:
    named = settings.evaluation.clip_score
    if named is None:
        return {}, {}
    from qwen_vl_lora.evaluation.clip_score import load_clip, score_with_clip
    from qwen_vl_lora.model.devices import choose_device

    if not any(item.image_path for item in predictions):
        raise DataFormatError("evaluation.clip_score needs pictures, but no held-out question has one. Set it to null.")
    clip = load_clip(named, project, choose_device(settings.device))
    found = score_with_clip(predictions, sides, images, clip)
    pictures = _pictures(predictions)
    told: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    for side, both in found.items():
        columns |= {f"{side}_clip_score": both[0], f"{side}_ref_clip_score": both[1]}
        told[side] = {
            name: _mean(values, pictures, settings)
            for name, values in zip(("CLIPScore", "RefCLIPScore"), both, strict=True)
        }
        told[side]["truncated"] = sum(item.written(side).caption in clip.truncated for item in predictions)
    cut_references = len({text for item in predictions for text in item.references} & clip.truncated)
    if cut := {side: each["truncated"] for side, each in told.items() if each["truncated"]}:
        logger.warning("CLIP saw only the first %d tokens of some captions: %s.", clip.limit, cut)
    facts = {"model": named, "tokens": clip.limit, "truncated_references": cut_references}
    return {"clip_score": {**facts, "sides": told}}, columns


def _mean(values: Any, pictures: Sequence[str], settings: Parameters) -> dict[str, Any]:
    """Mean and its 95 % interval over pictures, of the questions that have one."""
    has_picture = ~np.isnan(values)
    shown = [picture for picture, has in zip(pictures, has_picture, strict=True) if has]
    scoring = settings.scoring
    interval = mean_interval(values[has_picture], shown, scoring.bootstrap_samples, scoring.seed)
    return {"value": float(values[has_picture].mean()), "interval": list(interval)}


def _pictures(predictions: Sequence[Prediction]) -> list[str]:
    return [item.image_path or item.image_id for item in predictions]
