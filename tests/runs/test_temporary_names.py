"""What a kill leaves in the middle of a write lies under a name that `prune` finds."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from qwen_vl_lora.datasets.artifacts import ArtifactDataset
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore, StagedShards
from qwen_vl_lora.features.tower import _write_shard
from qwen_vl_lora.runs.records import RecordWriter
from qwen_vl_lora.runs.run import Run
from qwen_vl_lora.runs.storage import leftovers, write_whole
from samples.pictures import jpeg
from samples.test_image_stage import make_stage


class KilledError(BaseException):
    """The process would be gone here."""


def _record(folder):
    RecordWriter(folder / "r1", Run("r1")).open({"conf/base/parameters.yml": "seed: 1\n"})


def _note_of_an_address(folder):
    stage = make_stage(folder)
    stage._note_fetched("https://example.org/x.png", stage.add(jpeg()))


def _features(folder):
    key = FeatureKey("f", 112, 112, None, None, "float32", ())
    FeatureStore(folder).publish(StagedShards(key, ()))


WRITES = {
    "text": lambda folder: write_whole(folder / "a.json", "text"),
    "artifact": lambda folder: ArtifactDataset(filepath=str(folder / "a.json"), dataset="json.JSONDataset").save({}),
    "run record": _record,
    "picture": lambda folder: make_stage(folder).add(jpeg()),
    "note of an address": _note_of_an_address,
    "features": _features,
    "shard": lambda folder: _write_shard({"a" * 64: torch.zeros(2, 2)}, folder),
}


@pytest.mark.parametrize("what", WRITES)
def test_everything_that_a_kill_leaves_is_found(tmp_path, monkeypatch, what):
    def kill(*arguments, **options):
        raise KilledError

    def nothing(*arguments, **options):
        return None

    monkeypatch.setattr(Path, "replace", kill)
    monkeypatch.setattr(Path, "rename", kill)
    if what == "picture":
        monkeypatch.setattr(os, "replace", kill)
    monkeypatch.setattr(Path, "unlink", nothing)
    monkeypatch.setattr(os, "unlink", nothing)
    monkeypatch.setattr(shutil, "rmtree", nothing)
    with pytest.raises(KilledError):
        WRITES[what](tmp_path)
    monkeypatch.undo()
    found = {path for folder in (tmp_path, *tmp_path.rglob("*/")) for path in leftovers(folder)}
    hidden = {path for path in tmp_path.rglob(".*") if path.name != ".lock"}
    assert found
    assert hidden == found
