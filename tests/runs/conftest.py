"""Run records made by hand, and the pipelines' own fixtures for real ones."""

from __future__ import annotations

import json

import pytest

from pipelines.conftest import fresh_run, newest, once, project, run  # noqa: F401
from qwen_vl_lora.runs.records import read_record, runs_folder


@pytest.fixture
def record(tmp_path):
    """`record("r1", wrote=["images"], read={"images": "r0"}, stages={…})`: a record on disk; ids are versions."""
    numbers = iter(range(1, 100))

    def make(run_id, wrote=(), read=None, stages=None, recipe="tiny", **facts):
        folder = runs_folder(tmp_path, recipe) / run_id
        folder.mkdir(parents=True)
        text = {
            "format": 1,
            "id": run_id,
            "sequence": next(numbers),
            "outcome": "finished",
            "recipe": recipe,
            "stages": stages or {"data_engineering": list(wrote)},
            **facts,
            "datasets": {
                "read": {name: {"version": version, "path": "x"} for name, version in (read or {}).items()},
                "written": {name: {"version": run_id, "path": "x"} for name in wrote},
            },
        }
        (folder / "record.json").write_text(json.dumps(text))
        return read_record(folder)

    return make
