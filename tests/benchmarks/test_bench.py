"""The bench measures equal work on both sides, and its results have the declared form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))


@pytest.fixture
def toy(tmp_path):
    """A prepared toy job."""
    from benchmarks.jobs import Job
    from benchmarks.workloads import choose

    from benchmarks import replica

    options = {"base": "toy", "weights": {}, "images": 2, "captions": 2, "side": 56}
    options["parameters"] = choose("W2_ckpt")[0].toy().parameters
    job = Job("benchmarks.replica", "prepare_base", tmp_path, tmp_path, tmp_path / "base", options=options)
    replica.build_base(job.base_path, replica.GEOMETRIES["toy"])
    replica.prepare_training(job)
    return job


def test_both_sides_feed_the_same_tokens_and_score_the_same_ones(toy, monkeypatch):
    from benchmarks import project, tutorial
    from qwen_vl_lora.model.base_model import BaseModel
    from qwen_vl_lora.model.chat import ChatEncoder
    from qwen_vl_lora.parameters import Parameters
    from qwen_vl_lora.samples.conversations import parse_conversation

    job = toy
    monkeypatch.chdir(job.data)
    record = job.conversations("train")[0]
    processor = BaseModel(name="toy", path=job.base).load_processor()
    images = project.open_images(job.data, "train")
    image = Parameters.model_validate(job.parameters).image

    ours = ChatEncoder(processor, image, images).encode(parse_conversation(record))
    theirs = tutorial.RowMapper(processor, job.parameters)(record)

    end = np.flatnonzero(ours.scored)[-1] + 1  # the template's line break behind the answer is scored by neither
    assert ours.ids[:end].tolist() == theirs["input_ids"]
    assert np.where(ours.scored, ours.ids, -100)[:end].tolist() == theirs["labels"]
    assert theirs["pixel_values"].shape[0] == 4 * int(ours.is_image.sum())


def test_both_sides_write_the_same_captions(toy, tmp_path, monkeypatch):
    from benchmarks.measuring import check_captions

    from benchmarks import project, replica, tutorial

    folder = tmp_path / "captioning"
    folder.mkdir()
    job = replace(toy, task="caption", data=folder, scratch=folder / "prepared")
    job = replace(job, options={**job.options, **replica.prepare_captioning(job)})
    monkeypatch.chdir(folder)
    sides = {"baseline": tutorial, "project": project}
    pair = {name: side.caption(replace(job, scratch=folder / name)) for name, side in sides.items()}

    assert len(pair["project"]["tuned_captions"]) == 2
    assert check_captions(pair)["failures"] == []


def measure_once(name, images, folder):
    """A toy of a workload, run on both sides: what the bench writes of it, checked for what all workloads have."""
    from benchmarks.workloads import choose

    from benchmarks import bench

    workload = replace(choose(name)[0].toy(), images=images)
    bench.run([workload], folder / "results.json", {workload.key: 1}, threads=1)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert {"commit", "machine", "workloads"} <= set(results)
    entry = results["workloads"][workload.key]
    assert entry["checks"]["failures"] == []
    assert entry["ratio"] == pytest.approx(entry["baseline_s"] / entry["project_s"], rel=1e-2)
    for side in ("baseline", "project"):
        assert set(entry["runs"][side][0]) >= {"seconds", "cpu_s", "peak_mb"}
    assert f"| {workload.key} |" in (folder / "results.md").read_text(encoding="utf-8")
    return entry


def test_a_workload_runs_on_both_sides_and_reports_in_the_declared_form(tmp_path):
    measure_once("D_2000", 12, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # five processes that import torch
def test_both_sides_train_to_the_same_tensors_as_processes_of_their_own(tmp_path):
    entry = measure_once("W2_ckpt", 3, tmp_path)
    assert entry["checks"]["tensors_equal"]
    assert min(entry["baseline_peak_mb"], entry["project_peak_mb"]) > 100
    for side in ("baseline", "project"):
        assert set(entry["runs"][side][0]) >= {"train_s", "steps"}


def test_a_killed_bench_goes_on_where_it_stopped_and_forgets_what_other_code_measured(tmp_path, monkeypatch):
    from benchmarks.workloads import choose

    from benchmarks import bench, startup

    def runs(repeats):
        bench.run(choose("S"), tmp_path / "results.json", {"S": repeats}, threads=1)
        return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["workloads"]["S"]["runs"]["project"]

    monkeypatch.setattr(bench, "current_commit", lambda _: "one")
    (first,) = runs(1)
    assert first["seconds"] > 0
    # From here on the bookkeeping is looked at, and starting Kedro again would add nothing to it.
    told = {"seconds": 123.0, "cpu_s": 100.0, "peak_mb": 45.0}
    monkeypatch.setattr(startup, "time_start", lambda _: told)
    monkeypatch.setattr(startup, "imported_modules", lambda _: set())
    both = runs(2)
    assert both == [first, told]
    assert runs(2) == both
    monkeypatch.setattr(bench, "current_commit", lambda _: "another")
    assert runs(1) == [told]


def test_what_does_not_fit_in_the_minutes_is_left_out(tmp_path, capsys):
    from benchmarks.workloads import choose

    from benchmarks import bench

    times = {"W2_ckpt": 1, "D_20000": 1}
    results = bench.run(choose("W2_ckpt,D_20000"), tmp_path / "results.json", times, threads=1, minutes=1)
    assert results["workloads"] == {}
    assert "W2_ckpt is left out" in capsys.readouterr().err


def runs_of(baseline, project):
    """Runs of both sides by their seconds; they were busy all the time."""
    sides = {"baseline": baseline, "project": project}
    memory = {"baseline": 2.0, "project": 1.0}
    return {
        side: [{"seconds": time, "cpu_s": time, "peak_mb": memory[side]} for time in times]
        for side, times in sides.items()
    }


def test_five_pairs_are_judged_by_their_lower_quartile_and_fewer_by_the_medians():
    from benchmarks.measuring import summarize
    from benchmarks.workloads import choose

    (workload,) = choose("W1_2ep")  # at least 2.7 times as fast
    five = summarize(workload, runs_of([30, 30, 28, 26, 20], [10, 10, 10, 10, 10]), {"failures": []})
    assert (five["ratio"], five["lower_quartile"], five["reached"]) == (2.8, 2.6, False)
    assert five["noise"] == {"wall": 1.5, "cpu": 1.5}
    two = summarize(workload, runs_of([30, 26], [10, 10]), {"failures": []})
    assert (two["ratio"], two["cpu_ratio"], two["lower_quartile"], two["reached"]) == (2.8, 2.8, None, True)


def test_the_bench_without_long_is_expected_to_end_within_25_minutes():
    from benchmarks.workloads import WORKLOADS

    assert sum(workload.seconds * workload.times(is_long=False) for workload in WORKLOADS) <= 25 * 60
    assert {workload.key for workload in WORKLOADS if workload.times(is_long=True) >= 5} >= {"W1_2ep", "W1_5ep_ckpt"}


def test_the_history_marks_a_loss_of_speed_on_the_same_machine(tmp_path):
    from benchmarks import history

    def results(date, machine, **ratios):
        workloads = {
            key: {"ratio": ratio, "ratio_of": "project/baseline" if key == "S" else "baseline/project", "baseline_s": 1}
            for key, ratio in ratios.items()
        }
        told = {"commit": "abc", "machine": machine, "workloads": workloads}
        (tmp_path / f"{date}-{machine}.json").write_text(json.dumps(told), encoding="utf-8")

    results("2026-01-01", "one", S=1.3, W0=8.0)
    results("2026-01-02", "two", W0=4.0)
    results("2026-01-03", "one", S=1.5, W0=7.9)
    results("2026-01-04", "one", S=1.4, W0=6.0)
    (tmp_path / "2026-01-05-one-memory.json").write_text('{"cells": []}', encoding="utf-8")

    rows = history.write(tmp_path).read_text(encoding="utf-8").splitlines()[-4:]

    assert rows == [
        "| 2026-01-01 | abc | one | 1.30 | 8.00 |",
        "| 2026-01-02 | abc | two | – | 4.00 |",
        "| 2026-01-03 | abc | one | **1.50** | 7.90 |",
        "| 2026-01-04 | abc | one | 1.40 | **6.00** |",
    ]


def test_a_difference_in_the_work_is_named():
    from benchmarks.measuring import check_training
    from benchmarks.workloads import choose

    equal = {"tokens": 9, "image_tokens": 4, "scored_tokens": 3, "first_loss": 2.0}
    pair = {
        "baseline": {"check": equal, "steps": 2},
        "project": {"check": {**equal, "image_tokens": 0, "first_loss": 2.1}, "steps": 2},
    }
    verdict = {"tensors_equal": True, "validation_loss": {"baseline": 1.0, "project": 1.006}}

    failures = check_training(choose("W0")[0], pair, verdict)["failures"]

    assert failures == [
        "image_tokens differ: [4, 0]",
        "first_loss differs by 4.762%, allowed 0.010%",
        "validation_loss differs by 0.596%, allowed 0.500%",
    ]


def test_an_unknown_workload_is_refused_with_the_names_there_are():
    from benchmarks.workloads import choose

    with pytest.raises(ValueError, match="No workload 'W9'; there are S, D_2000, D_2000_reference, W0"):
        choose("W9")
    assert [workload.key for workload in choose("W2")] == ["W2", "W2_ckpt"]
    assert [workload.key for workload in choose("W1_2ep,S")] == ["W1_2ep", "S"]
