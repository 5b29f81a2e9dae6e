"""Times and numbers of processes are those that a user would work out from the measured speeds."""

import pytest

from qwen_vl_lora.training.rows import group_rows
from qwen_vl_lora.training.stages import Pace, feature_use, processes_within, stages_of
from training.test_rows import encoded

COUNTS = {"collect_samples": 1000, "encode_images": 0, "train_adapter": 800, "generate_captions": 40}
PACES = {"collect_samples": Pace(100, "a run"), "generate_captions": Pace(2, "a run")}


def test_a_stage_takes_its_work_over_the_speed_of_all_processes():
    stages = {stage.name: stage for stage in stages_of(COUNTS, PACES, processes=2)}
    assert list(stages) == ["collect_samples", "train_adapter", "generate_captions"]
    assert stages["collect_samples"].seconds == 5
    assert stages["generate_captions"].seconds == 10
    assert (stages["train_adapter"].seconds, stages["train_adapter"].count) == (None, 800)


@pytest.mark.parametrize(("seconds", "processes"), [(30, 1), (29.9, 2), (10, 3), (1, 30)])
def test_the_processes_that_are_enough_share_the_work_of_all_stages(seconds, processes):
    within = processes_within(seconds, stages_of(COUNTS, PACES, processes=1))
    assert within.processes == processes
    assert within.left_out == ["train_adapter"]


@pytest.mark.parametrize(
    ("rows", "epochs", "uses"), [("shared", 1, 1), ("shared", 2, 2), ("separate", 1, 1.5), ("separate", 2, 3)]
)
def test_features_pay_where_training_needs_a_picture_more_than_once(rows, epochs, uses):
    pictures = ["a", "a", "b", "c", "d", "d"]
    conversations = [encoded(str(number), name, answer=3) for number, name in enumerate(pictures)]
    use = feature_use(group_rows(conversations, rows, 1000), epochs, num_pictures=6, encoding=Pace(2, "a run"))
    assert use.uses == pytest.approx(uses)
    assert use.pays == (uses > 1)
    assert use.stored_seconds == 3  # four of training, two held out
    assert use.streamed_seconds == pytest.approx((4 * uses + 2) / 2)
    assert feature_use([], 1, 0, None) is None
