"""Versions that are read together were made together."""

import pytest

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.consistency import choose_versions

DATA = ["images", "train_conversations", "test_conversations"]
TRAINING = ["images", "train_conversations"]
EVALUATION = ["adapter", "images", "test_conversations"]


def stored(names, *versions):
    return {name: sorted(versions, reverse=True) for name in names}


def test_the_newest_complete_run_is_read(record):
    records = [record("d1", DATA), record("d2", DATA)]
    assert choose_versions(records, stored(TRAINING, "d1", "d2"), {}) == dict.fromkeys(TRAINING, "d2")


def test_a_half_finished_data_run_is_left_out(record):
    records = [record("d1", DATA), record("d2", ["images"], stages={"data_engineering": DATA}, outcome="failed")]
    on_disk = {"images": ["d2", "d1"], "train_conversations": ["d1"]}
    assert choose_versions(records, on_disk, {}) == dict.fromkeys(TRAINING, "d1")


def test_a_run_whose_data_are_whole_counts_though_its_training_failed(record):
    stages = {"data_engineering": DATA, "training": ["adapter"]}
    records = [record("d1", DATA), record("r2", DATA, stages=stages, outcome="failed")]
    assert choose_versions(records, stored(TRAINING, "d1", "r2"), {}) == dict.fromkeys(TRAINING, "r2")


def test_a_clock_that_goes_backwards_does_not_matter(record):
    records = [record("2026-05", DATA), record("2026-01", DATA)]
    assert choose_versions(records, stored(TRAINING, "2026-01", "2026-05"), {}) == dict.fromkeys(TRAINING, "2026-01")


def test_evaluation_reads_the_test_split_of_the_data_that_the_adapter_was_trained_on(record):
    records = [
        record("d1", DATA),
        record("t2", ["adapter"], dict.fromkeys(TRAINING, "d1"), {"training": ["adapter"]}),
        record("d3", DATA),
    ]
    on_disk = {"adapter": ["t2"], **stored(["images", "test_conversations"], "d1", "d3")}
    assert choose_versions(records, on_disk, {}) == {"adapter": "t2", "images": "d1", "test_conversations": "d1"}


def test_a_named_adapter_takes_its_own_data_along(record):
    records = []
    for data, adapter in (("d1", "t2"), ("d3", "t4")):
        records.append(record(data, DATA))
        records.append(record(adapter, ["adapter"], dict.fromkeys(TRAINING, data), {"training": ["adapter"]}))
    on_disk = {"adapter": ["t4", "t2"], **stored(["images", "test_conversations"], "d1", "d3")}
    chosen = choose_versions(records, on_disk, {"adapter": "t2"})
    assert chosen == {"images": "d1", "test_conversations": "d1"}


def test_a_split_made_again_goes_with_the_images_that_it_read(record):
    split = ["train_conversations", "test_conversations"]
    records = [record("d1", DATA), record("s2", split, {"images": "d1", "conversations": "d1"})]
    on_disk = {"images": ["d1"], "train_conversations": ["s2", "d1"]}
    assert choose_versions(records, on_disk, {}) == {"images": "d1", "train_conversations": "s2"}


def test_a_split_that_a_run_wrote_and_read_again_did_not_make_its_images(record):
    data = ["images", "train_conversations", "data_page"]
    records = [
        record("d1", data, {"images": "d1", "train_conversations": "d1"}),
        record("s2", data[1:], {"images": "d1", "train_conversations": "s2"}),
    ]
    on_disk = {"images": ["d1"], "train_conversations": ["s2", "d1"]}
    assert choose_versions(records, on_disk, {}) == {"images": "d1", "train_conversations": "s2"}


def test_reading_old_versions_once_does_not_make_them_the_newest(record):
    records = [
        record("d1", DATA),
        record("d2", DATA),
        record("t3", ["adapter"], dict.fromkeys(TRAINING, "d1"), {"training": ["adapter"]}),
    ]
    assert choose_versions(records, stored(TRAINING, "d1", "d2"), {}) == dict.fromkeys(TRAINING, "d2")


def test_pruned_versions_are_not_chosen(record):
    records = [record("d1", DATA), record("d2", DATA)]
    on_disk = {"images": ["d1", "d2"], "train_conversations": ["d1"]}
    assert choose_versions(records, on_disk, {}) == dict.fromkeys(TRAINING, "d1")


def test_without_records_one_common_version_is_read():
    assert choose_versions([], stored(TRAINING, "d1", "d2"), {}) == dict.fromkeys(TRAINING, "d2")


def test_a_mixture_is_refused_and_says_how_to_force_it(record):
    records = [record("d1", ["images"], stages={"data_engineering": DATA}, outcome="interrupted")]
    on_disk = {"images": ["d1"], "train_conversations": ["d0"]}
    with pytest.raises(MissingArtifactError, match='--load-versions "images:d1,train_conversations:d0"'):
        choose_versions(records, on_disk, {})
    assert choose_versions(records, on_disk, {"images": "d1", "train_conversations": "d0"}) == {}


def test_a_run_that_broke_off_is_not_taken_for_one_without_a_record(record):
    records = [record("d1", TRAINING, stages={"data_engineering": DATA}, outcome="interrupted")]
    with pytest.raises(MissingArtifactError, match="No complete run wrote images, train_conversations together"):
        choose_versions(records, stored(TRAINING, "d1"), {})


EXPORT = ["adapter", "caption_metrics", "test_conversations"]
WHOLE_STAGES = {"data_engineering": DATA, "training": ["adapter"], "evaluation": ["caption_metrics"]}


def whole_run(record, run_id):
    return record(run_id, [*DATA, "adapter", "caption_metrics"], stages=WHOLE_STAGES)


def test_metrics_of_another_adapter_do_not_go_with_a_named_one(record):
    records = [whole_run(record, "r1"), record("t2", ["adapter"], dict.fromkeys(TRAINING, "r1"))]
    on_disk = {"adapter": ["t2", "r1"], **stored(["caption_metrics", "test_conversations"], "r1")}
    with pytest.raises(
        MissingArtifactError, match="caption_metrics r1 was made from adapter r1, not from the adapter t2"
    ):
        choose_versions(records, on_disk, {"adapter": "t2"})


def test_a_named_adapter_takes_the_metrics_of_its_own_evaluation(record):
    records = [
        whole_run(record, "r1"),
        record("t2", ["adapter"], dict.fromkeys(TRAINING, "r1")),
        record("e3", ["caption_metrics"], {"adapter": "t2", "test_conversations": "r1"}),
        whole_run(record, "r4"),
    ]
    on_disk = {"adapter": ["r4", "t2", "r1"], **stored(["test_conversations"], "r1", "r4")}
    on_disk["caption_metrics"] = ["r4", "e3", "r1"]
    chosen = choose_versions(records, on_disk, {"adapter": "t2"})
    assert chosen == {"caption_metrics": "e3", "test_conversations": "r1"}


def test_an_old_adapter_may_be_measured_on_data_made_since(record):
    records = [whole_run(record, "r1"), whole_run(record, "r2")]
    on_disk = {"adapter": ["r2", "r1"], **stored(["images", "test_conversations"], "r2")}
    assert choose_versions(records, on_disk, {"adapter": "r1"}) == dict.fromkeys(["images", "test_conversations"], "r2")


def test_a_newer_version_that_has_to_be_left_is_named(record, caplog):
    records = [whole_run(record, "r1"), record("t2", ["adapter"], dict.fromkeys(TRAINING, "r1"))]
    on_disk = {"adapter": ["t2", "r1"], **stored(["caption_metrics", "test_conversations"], "r1")}
    with caplog.at_level("INFO", logger="qwen_vl_lora"):
        assert choose_versions(records, on_disk, {}) == dict.fromkeys(EXPORT, "r1")
    assert "Reading adapter r1 instead of the newest, t2" in caplog.text
