"""The small base is known by its fingerprint, and what it cannot do is said where it was trained on something else."""

from pathlib import Path

import pytest

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.shipped_base import DRAWINGS, DRAWINGS_ONLY, FINGERPRINT, note_on_base
from qwen_vl_lora.tiny import source

SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"
TABLE, SCENES = {"type": "CaptionsFileDataset"}, {"type": DRAWINGS}


def test_the_fingerprint_is_that_of_the_base_in_the_project():
    assert BaseModel(name="tiny", path=SHIPPED).fingerprint == FINGERPRINT


def test_the_source_of_drawings_has_its_name():
    from qwen_vl_lora.datasets import sources

    assert DRAWINGS in {*vars(source), *vars(sources)}


@pytest.mark.parametrize(
    ("fingerprint", "run", "note"),
    [
        (FINGERPRINT, {"read": {"captioned_images": TABLE}}, DRAWINGS_ONLY),
        (FINGERPRINT, {"read": {}, "made_from": [{"id": "r1", "source": TABLE}]}, DRAWINGS_ONLY),
        (FINGERPRINT, {"read": {}, "made_from": [{"id": "r1", "source": SCENES}]}, None),
        (FINGERPRINT, {"read": {"captioned_images": SCENES}, "made_from": []}, None),
        ("another", {"read": {"captioned_images": TABLE}}, None),
        (FINGERPRINT, {}, None),  # made outside of a run
    ],
)
def test_the_note_is_for_this_base_on_other_pictures(fingerprint, run, note):
    assert note_on_base({"base_model": {"fingerprint": fingerprint}, "run": run}) == note
