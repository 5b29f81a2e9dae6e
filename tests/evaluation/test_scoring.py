"""A judge and CLIPScore stand beside the metrics, and change nothing of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml

from conftest import PROJECT
from evaluation.rows import table_of, with_contender
from evaluation.servers import FaultyServer, Reply
from qwen_vl_lora.evaluation.scoring import score_table
from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import validate_parameters

LONG = "a very long caption of a dog that runs"
ROWS = [(["a dog"], "an owl", "a dog"), (["a cat"], "an owl", LONG), (["a cow"], "", "a cow")]


@pytest.fixture
def table(images):
    made = table_of(ROWS).assign(image_path=[entry.path for entry in images][:3], base_cut="false", tuned_cut="false")
    return with_contender(made, "older", ["a dog", "a cat", "a pig"])


@pytest.fixture
def score(images, tmp_path):
    """`score(table, clip_score=…)`: metrics and scores with these parameters of `evaluation`."""
    tree = yaml.safe_load((PROJECT / "conf/base/parameters.yml").read_text(encoding="utf-8"))
    small = {**tree, "device": "cpu", "scoring": {**tree["scoring"], "bootstrap_samples": 100}}

    def go(given, **evaluation):
        settings = validate_parameters({**small, "evaluation": {**tree["evaluation"], **evaluation}})
        return score_table(given, images, tmp_path, settings)

    return go


def test_all_stand_beside_the_metrics_and_change_nothing_of_them(score, table, clip_path, caplog):
    metrics, scores = score(table)
    assert not {"judge", "clip_score"} & metrics.keys()
    with FaultyServer(lambda body: Reply("tie")) as server:
        judge = {"address": server.address, "retries": 0}
        told, columns = score(table, judge=judge, clip_score=clip_path.name)
    assert {name: told[name] for name in metrics} == metrics
    pd.testing.assert_frame_equal(columns[scores.columns], scores)
    assert told["judge"]["model"] == "captions"
    assert told["judge"]["against"]["older"] | {"interval": None} == {
        "tuned_wins": 0, "ties": 3, "judged": 3, "not_judged": 0, "tuned_share": 0.5, "interval": None,
    }  # fmt: skip
    assert columns["judged_base"].tolist() == columns["judged_older"].tolist() == ["tie"] * 3
    clip = told["clip_score"]
    assert (clip["model"], clip["tokens"], clip["truncated_references"]) == ("clip", 24, 0)
    assert [clip["sides"][side]["truncated"] for side in ("base", "tuned", "older")] == [0, 1, 0]
    assert "CLIP saw only the first 24 tokens of some captions: {'tuned': 1}" in caplog.text
    for side in ("base", "tuned", "older"):
        found = clip["sides"][side]["CLIPScore"]
        assert found["value"] == pytest.approx(columns[f"{side}_clip_score"].mean())
        assert found["interval"][0] <= found["value"] <= found["interval"][1]
        assert (columns[f"{side}_ref_clip_score"] <= np.maximum(columns[f"{side}_clip_score"], 1)).all()


def test_clip_score_without_a_picture_is_refused(score, table, clip_path):
    with pytest.raises(DataFormatError, match="evaluation.clip_score needs pictures"):
        score(table.assign(image_path=""), clip_score=clip_path.name)
