"""`qwen-vl-lora caption` answers with captions on stdout and everything else on stderr."""

import sys

import pytest

import command_line
from finished_project import finished_project
from samples.pictures import jpeg, write


@pytest.fixture
def caption(tmp_path_factory, base_path, tmp_path):
    """`caption("a.jpg", "--adapter", "none")` in a project with one adapter; pictures lie in `tmp_path`."""
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    write(tmp_path / "a.jpg", jpeg(1))
    write(tmp_path / "b.jpg", jpeg(2))
    write(tmp_path / "page.jpg", b"<html>")

    def call(*arguments, params="device=cpu"):
        command = [
            sys.executable,
            "-m",
            "qwen_vl_lora",
            "caption",
            *(str(tmp_path / a) if a.endswith(".jpg") else a for a in arguments),
        ]
        command += ["--params", params]
        return command_line.call(command, project)

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
    tuned, base = captions_of(caption("a.jpg")), captions_of(caption("a.jpg", "--adapter", "none"))
    assert tuned
    assert base  # a random base may write several lines
    assert tuned != base
    assert captions_of(caption("a.jpg", "--prompt", "Which shapes are there?"))


def test_decoding_that_is_given_is_used_beside_an_adapter(caption):
    result = caption("a.jpg", params="device=cpu,generation.max_new_tokens=2")
    assert captions_of(result)
    assert "cut after 2 tokens" in result.stderr


def test_only_bad_pictures_are_a_failure(caption):
    result = caption("page.jpg")
    assert result.returncode == 1
    assert lines_of(result) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jpg"], "gone.jpg. Expected a folder, a picture, or a CSV"),
        (["a.jpg", "--adapter", "2020-01-01"], "version 2020-01-01 of"),
    ],
)
def test_an_expected_fault_is_one_message(caption, arguments, message):
    result = caption(*arguments)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


class _Hostile:
    """A captioner whose base has control characters in its vocabulary."""

    def caption(self, images, usable):
        from qwen_vl_lora.evaluation.generation import Caption

        return [Caption("\x1b]0;owned\x07a dog\nb.jpg: forged\r\u202e", is_cut=False)] * len(usable)


@pytest.mark.parametrize("names", [["a\x1b[2J.jpg"], ["a\x1b[2J.jpg", "b.jpg"]])
def test_a_models_words_and_files_names_act_on_no_terminal(tmp_path, capsys, image_parameters, names):
    from qwen_vl_lora.commands.caption import _write
    from qwen_vl_lora.samples.named_pictures import gather_pictures

    for number, name in enumerate(names):
        write(tmp_path / name, jpeg(number))
    write(tmp_path / "bad\x1b.jpg", b"<html>")
    paths = [tmp_path / name for name in names]
    _write(
        _Hostile(),
        gather_pictures(
            [*paths, tmp_path / "bad\x1b.jpg"][: len(paths) + (len(names) > 1)], image_parameters, recursive=False
        ),
    )
    said = capsys.readouterr()
    assert not set("\x1b\x07\r\u202e") & set(said.out + said.err)
    assert r"\x1b]0;owned\x07a dog" in said.out
    assert len(said.out.splitlines()) == 2  # one caption of two lines, or two captions of one each
