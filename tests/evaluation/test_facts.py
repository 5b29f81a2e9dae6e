"""What the page says of an adapter comes from its record, which may be a stranger's."""

from __future__ import annotations

import pytest

from qwen_vl_lora.evaluation.facts import facts_of
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.adapter_record import faults_of_record
from qwen_vl_lora.pages.language import ENGLISH
from tiny_adapters import adapter_record, write_record

TRAINING = {"trainable_parameters": 1}


@pytest.fixture
def made(tmp_path):
    """`made(training, run)`: the sentence on what made an adapter with these blocks in its record."""

    def tell(training, run):
        write_record(tmp_path, adapter_record(training={**TRAINING, **training}, run={"id": "r1", **run}))
        return facts_of(Adapter(tmp_path), 64, {}).made

    return tell


def test_date_duration_machine_and_commit_are_named(made):
    run = {"started": "2026-11-25T03:52:45Z", "cpu": "EPYC", "cores": 2, "device": "cpu"}
    run["git"] = {"commit": "a756ae3" * 6, "dirty": True}
    assert made({"seconds": 220.4}, run) == (
        "trained 2026-11-25 in 3 min 40 s on EPYC, 2 cores from commit a756ae3a756a with local changes"
    )
    assert made({}, {"cpu": "EPYC", "cores": 8, "device": "cuda: NVIDIA H200"}) == "on NVIDIA H200"
    assert made({}, {"git": "none"}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "7 s"), (60, "1 min 0 s"), (3599.6, "1 h 0 min"), (7380, "2 h 3 min")]
)
def test_durations_are_told_in_two_units(seconds, text):
    assert ENGLISH.duration(seconds) == text


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ({"curve": "x"}, "training.curve"),
        ({"curve": [{"loss": 1.0}]}, "training.curve.0.step"),
        ({"curve": [{"step": 1, "loss": "1"}]}, "training.curve.0.loss"),
        ({"seconds": "many"}, "training.seconds"),
    ],
)
def test_a_record_whose_curve_cannot_be_drawn_is_refused(training, key):
    (fault,) = faults_of_record(adapter_record(training={**TRAINING, **training}))
    assert fault.startswith(f"{key}: ")
