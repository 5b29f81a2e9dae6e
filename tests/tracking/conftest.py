"""A SwanLab cloud on loopback, and trackers that write to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwen_vl_lora.parameters import SwanLabParameters
from qwen_vl_lora.tracking import tracker as tracking
from qwen_vl_lora.tracking.swanlab import SwanLabTracker
from tracking.cloud import KEY, Cloud


@pytest.fixture
def make_cloud():
    made = []

    def make():
        made.append(Cloud())
        return made[-1]

    yield make
    for cloud in made:
        cloud.close()


@pytest.fixture
def cloud(make_cloud, monkeypatch):
    """A cloud that the environment names, with a key for it."""
    cloud = make_cloud()
    monkeypatch.setenv("SWANLAB_API_HOST", cloud.address)
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    return cloud


@pytest.fixture
def make_tracker(tmp_path, monkeypatch):
    """`make_tracker(mode="online")`: a run that SwanLab alone is told of; what a test leaves open is ended."""
    made = []

    def make(describe=dict, **changes):
        named = {
            "mode": "offline",
            "project": "a-project",
            "experiment_name": "an-experiment",
            "workspace": None,
            "prediction_images": 2,
        }
        monkeypatch.setattr(tracking, "current_run", lambda: SimpleNamespace(outline=describe))
        settings = SwanLabParameters(**{**named, **changes})
        made.append(tracking.TrackedRun([SwanLabTracker(settings, tmp_path / "swanlab")]))
        return made[-1]

    yield make
    for tracker in made:
        tracker.end("interrupted")
