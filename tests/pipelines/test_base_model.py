"""The `base_model` pipeline, on a recipe of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.runner import SequentialRunner

from qwen_vl_lora.pipelines.base_model import create_pipeline
from qwen_vl_lora.tiny import pretraining, quality
from qwen_vl_lora.tiny.pretraining import PretrainingRecipe, Stage
from qwen_vl_lora.tiny.tiny_model import TinySizes
from samples.pictures import workspace_folder

SMALL = TinySizes(hidden=64, intermediate=64, layers=1, heads=2, vision_width=64, vision_depth=1, vision_heads=2)


def test_base_model_builds_a_model_with_a_card_and_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(steps=2, batch_size=2, learning_rate=1e-3, warmup_steps=1, cooldown_steps=1)
    short = PretrainingRecipe(tower=stage, language=stage, block_batches=2, sizes=SMALL)
    monkeypatch.setattr(pretraining, "SHIPPED_RECIPE", short)
    monkeypatch.setattr(quality, "NUM_SCENES", 4)
    workspace = workspace_folder(tmp_path)
    catalog = DataCatalog({"workspace": MemoryDataset(workspace, copy_mode="assign")})
    outputs = SequentialRunner().run(create_pipeline(), catalog)
    measured = outputs["tiny_base_quality"].load()
    assert measured["num_scenes"] == 4
    assert 0 <= measured["attributes_right"] <= 1
