"""`qwen-vl-lora report` puts runs side by side in one page."""

import json
import sys

import pytest

import command_line
from finished_project import finished_project


@pytest.fixture(scope="module")
def project(tmp_path_factory, base_path):
    return finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))


def call(project, *arguments):
    command = [sys.executable, "-m", "qwen_vl_lora", "report", *arguments]
    return command_line.call(command, project)


def runs_of(project):
    return [path.parent for path in sorted((project / "data/08_reporting/tiny/runs").glob("*/record.json"))]


def second_run(project, change):
    """A second evaluation's record: the first one's with another id and setting, over the same artifacts."""
    first = runs_of(project)[0]
    record = json.loads((first / "record.json").read_text())
    record["id"] = "2030-01-01T00.00.00.000Z"
    change(record)
    folder = first.with_name(record["id"])
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_two_runs_stand_side_by_side_with_what_they_were_set_to(project, tmp_path):
    other = second_run(project, lambda record: record["parameters"]["lora"].update(r=8))
    done = call(project, str(runs_of(project)[0]), str(other), "--output", str(tmp_path / "both.html"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "with r=64, " in page
    assert "r=8 minus r=64: 0.00 (95 % interval 0.00 to 0.00, no difference)" in page
    assert page.count("Set differently") == 2
    assert "<dt>lora.r</dt><dd>8</dd>" in page
    assert page.count("<article") == 12
    assert page.partition('<h2 id="captions"')[2].count("data:image/webp") == 12


def test_the_language_of_the_page_can_be_chosen(project, tmp_path):
    done = call(project, str(runs_of(project)[0]), "--language", "zh", "-o", str(tmp_path / "zh.html"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "zh.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in page
    assert "本页使用中文（<code>report.language: zh</code>）。" in page


def test_one_run_named_twice_is_one_column(project, tmp_path):
    first = str(runs_of(project)[0])
    done = call(project, first, first, "-o", str(tmp_path / "one.html"))
    assert done.returncode == 0, done.stderr
    assert "Set differently" not in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_a_run_without_evaluation_says_what_to_name(project, tmp_path):
    def keep_training_only(record):
        record["pipelines"] = ["training"]
        for name in ("predictions", "caption_metrics", "caption_scores"):
            del record["datasets"]["written"][name]

    done = call(project, str(second_run(project, keep_training_only)), "-o", str(tmp_path / "none.html"))
    assert done.returncode == 1
    assert "wrote no predictions and metrics. Name a run of the evaluation pipeline" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none.html").exists()
