"""The small base is known by its fingerprint, and what it cannot do is said where it was trained on something else."""

from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.shipped_base import DRAWINGS, FINGERPRINT, NOT_FOR_PHOTOGRAPHS, note_on_base
from qwen_vl_lora.pages.language import ENGLISH
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.tiny import source

PARAMETERS = Path(__file__).parents[2] / "conf" / "base" / "parameters.yml"
SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"
TABLE, SCENES = {"type": "CaptionsFileDataset"}, {"type": DRAWINGS}

DRAWINGS_ONLY = ENGLISH("drawings_only")


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


@pytest.mark.parametrize(("fingerprint", "warned"), [(FINGERPRINT, True), ("another", False)])
def test_whoever_captions_with_this_base_is_told_that_it_knows_no_photographs(caplog, fingerprint, warned):
    from qwen_vl_lora.evaluation.inference import choose_captioner

    base = BaseModel(name="tiny", path=SHIPPED)
    base.__dict__["fingerprint"] = fingerprint  # where the cached property keeps it
    choose_captioner(base, None, validate_parameters(yaml.safe_load(PARAMETERS.read_text(encoding="utf-8"))))
    assert (NOT_FOR_PHOTOGRAPHS in caplog.messages) is warned
