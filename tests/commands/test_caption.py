"""`qwen-vl-lora caption` answers with captions on stdout and everything else on stderr."""

import subprocess
import sys

import pytest

from finished_project import finished_project
from samples.pictures import jpeg, write


@pytest.fixture
def caption(tmp_path_factory, base_path, tmp_path):
    """`caption("a.jpg", "--adapter", "none")` in a project with one adapter; pictures lie in `tmp_path`."""
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    write(tmp_path / "a.jpg", jpeg(1))
    write(tmp_path / "b.jpg", jpeg(2))
    write(tmp_path / "page.jpg", b"<html>")

    def call(*arguments):
        command = [
            sys.executable,
            "-m",
            "qwen_vl_lora",
            "caption",
            *(str(tmp_path / a) if a.endswith(".jpg") else a for a in arguments),
        ]
        command += ["--params", "device=cpu"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False, timeout=120)

    return call


def captions_of(result):
    """stdout without the record in which Kedro, at its import, names its logging configuration."""
    assert result.returncode == 0, result.stderr
    return lines_of(result)


def lines_of(result):
    return [line for line in result.stdout.splitlines() if not line.startswith(("[", " " * 20))]


def test_one_picture_gives_its_caption_alone(caption):
    (line,) = captions_of(caption("a.jpg"))
    assert "a.jpg" not in line


def test_several_pictures_are_named_and_a_bad_one_is_told_apart(caption):
    result = caption("b.jpg", "page.jpg", "a.jpg")
    lines = captions_of(result)
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines] == ["b.jpg", "a.jpg"]
    assert "page.jpg: not_an_image" in result.stderr


def test_the_base_model_alone_and_another_prompt_say_something_else(caption):
    (tuned,), (base,) = captions_of(caption("a.jpg")), captions_of(caption("a.jpg", "--adapter", "none"))
    assert tuned != base
    assert captions_of(caption("a.jpg", "--prompt", "Which shapes are there?"))


def test_only_bad_pictures_are_a_failure(caption):
    result = caption("page.jpg")
    assert result.returncode == 1
    assert lines_of(result) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jpg"], "gone.jpg is not there. Give a folder, a picture, or a CSV"),
        (["a.jpg", "--adapter", "2020-01-01"], "version 2020-01-01 of"),
    ],
)
def test_an_expected_fault_is_one_message(caption, arguments, message):
    result = caption(*arguments)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
