"""The inference pipeline captions what people point it at, as the adapter was trained to be asked."""

import itertools
import json
import re

import pandas as pd
import pytest
from PIL import Image

from qwen_vl_lora.evaluation import inference
from qwen_vl_lora.exceptions import AdapterError, DataFormatError, MissingArtifactError, ParameterError
from qwen_vl_lora.pipelines.inference import create_pipeline
from samples.pictures import animation, jpeg, write

TRAINED_PROMPT = "What is in this picture?"


@pytest.fixture
def trained(run, once):
    """An adapter that was asked another question than the configured one."""

    def make():
        run("data_engineering", prompt={"user": TRAINED_PROMPT})
        run("training", prompt={"user": TRAINED_PROMPT}, training_args={"max_steps": 1})

    once("asked another question", make)


@pytest.fixture
def folder(tmp_path):
    """Five pictures (two the same), one page saved as a picture, one animation, and a text."""
    album = tmp_path / "album"
    for name, seed in {"a": 1, "b": 2, "c": 3, "d": 4, "copy_of_a": 1}.items():
        write(album / f"{name}.jpg", jpeg(seed, (60 + 10 * seed, 50)))
    write(album / "page.png", b"<html>404</html>")
    write(album / "moving.gif", animation("GIF"))
    write(album / "notes.txt", b"no picture")
    write(album / "deeper" / "e.jpg", jpeg(5))
    return album


def read(file):
    return pd.read_csv(file, keep_default_na=False, dtype=str)


def test_node_names_are_function_names():
    assert all(node.name == node.func.__name__ for node in create_pipeline().nodes)


def test_a_folder_becomes_captions_with_a_reason_for_each_bad_picture(trained, run, newest, folder, capsys):
    run("inference", inference={"images": str(folder)})
    said = capsys.readouterr()
    (version,) = [path.name for path in newest("06_models/tiny/adapter").parents[1].iterdir()]
    assert f"Adapter: {version} of recipe tiny, never evaluated (the newest of recipe tiny).\n" in said.err
    assert re.search(r"^table: data/07_model_output/tiny/captions.csv/\S+/captions.csv$", said.out, re.MULTILINE)
    table = read(newest("07_model_output/tiny/captions.csv"))
    assert list(table.columns) == ["image_path", "caption", "reason", "cut"]
    names = [path.rpartition("/")[2] for path in table["image_path"]]
    assert names == ["a.jpg", "b.jpg", "c.jpg", "copy_of_a.jpg", "d.jpg", "moving.gif", "page.png"]
    reasons = dict(zip(names, table["reason"], strict=True))
    assert reasons["page.png"].startswith("not_an_image: ")
    assert reasons["moving.gif"].startswith("animated_image: ")
    assert all((reason == "") == name.endswith(".jpg") for name, reason in reasons.items())
    captions = dict(zip(names, table["caption"], strict=True))
    assert captions["a.jpg"] == captions["copy_of_a.jpg"]
    assert captions["page.png"] == ""
    assert dict(zip(names, table["cut"], strict=True)) == {
        name: "true" if name.endswith(".jpg") else "" for name in names
    }  # the slice generates 4 tokens
    sheet = newest("07_model_output/tiny/caption_sheet.png")
    with Image.open(sheet) as opened:
        assert opened.width > 3 * 160


def test_prompt_and_size_are_those_of_the_adapter_whatever_is_configured(trained, run, folder, monkeypatch):
    asked = []
    write_each = inference.write_each

    def note(model, processor, prompts, *others):
        prompts = list(prompts)
        asked.extend(processor.tokenizer.decode(prompt.ids) for prompt in prompts)
        return write_each(model, processor, prompts, *others)

    monkeypatch.setattr(inference, "write_each", note)
    run("inference", inference={"images": str(folder / "a.jpg")}, image={"resized_height": 56, "resized_width": 56})
    assert TRAINED_PROMPT in asked[0]
    assert asked[0].count("<|image_pad|>") == 16  # 112x112, as trained; 56x56 would be 4


@pytest.fixture
def of_several_questions(trained, newest):
    """The adapter, as if its samples had brought two questions."""
    file = newest("06_models/tiny/adapter") / "adapter_record.json"
    record = json.loads(file.read_text())
    assert record["prompt"] == {"user": TRAINED_PROMPT, "system": None, "override": False}
    questions = [{"text": "How many?", "samples": 20}, {"text": "Where is it?", "samples": 10}]
    file.write_text(
        json.dumps(
            {**record, "prompt": {**record["prompt"], "user": None, "questions": questions, "other_questions": 0}}
        )
    )


def test_an_adapter_of_several_questions_is_not_asked_a_guess(of_several_questions, run, folder, newest, project):
    told = {"images": str(folder / "a.jpg")}
    before = list((project / "data/08_reporting/tiny/runs").iterdir())
    with pytest.raises(
        ParameterError, match=r"trained with 2 different questions: 'How many\?' \(20 samples\), 'Where"
    ):
        run("inference", inference=told)
    assert list((project / "data/08_reporting/tiny/runs").iterdir()) == before
    told = {**told, "settings_from": "parameters"}
    with pytest.raises(AdapterError, match=r"trained with 'How many\?' .*configured 'Describe this picture.'"):
        run("inference", inference=told)
    run("inference", inference=told, prompt={"user": "How many?"})
    assert len(read(newest("07_model_output/tiny/captions.csv"))) == 1


def test_the_caption_command_takes_the_question_of_an_adapter_of_several(of_several_questions, folder, base_path):
    from click.testing import CliRunner

    from qwen_vl_lora.commands.caption import caption

    picture = str(folder / "a.jpg")
    options = ["--params", f"base_model={base_path('qwen2_vl')},device=cpu"]
    with pytest.raises(ParameterError, match=r"`qwen-vl-lora caption` takes --prompt"):
        CliRunner().invoke(caption, [picture, *options], catch_exceptions=False)
    done = CliRunner().invoke(caption, [picture, "--prompt", "Where is it?", *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"{picture}: the caption was cut after 4 tokens (generation.max_new_tokens)" in done.stderr


def test_told_to_take_the_parameters_an_adapter_of_other_ones_is_refused(trained, run, folder, newest):
    told = {"images": str(folder / "a.jpg"), "settings_from": "parameters"}
    with pytest.raises(AdapterError, match=rf"prompt: trained with .*{TRAINED_PROMPT[:-1]}.*configured .*Describe"):
        run("inference", inference=told)
    run("inference", inference=told, prompt={"user": TRAINED_PROMPT})
    assert len(read(newest("07_model_output/tiny/captions.csv"))) == 1


def test_a_killed_run_goes_on_where_it_stopped(trained, run, newest, folder, project, monkeypatch):
    write_each = inference.write_each

    def die_in_the_second_part(*arguments):
        yield from itertools.islice(write_each(*arguments), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(inference, "_BATCHES_PER_NOTE", 1)
    monkeypatch.setattr(inference, "write_each", die_in_the_second_part)
    with pytest.raises(KeyboardInterrupt):
        run("inference", inference={"images": str(folder)}, generation={"batch_size": 2})
    (notes,) = (project / "data/09_workspace/tiny/inference").glob("*.jsonl")
    first, second = notes.read_text().splitlines()
    # A line of which a byte was damaged, and what a kill in the middle of a line leaves.
    notes.write_text(f'{first}\n{{"question": "x", "caption": \n{second}\n{{"question": "cut')
    sizes = []

    def count(model, processor, prompts, *others):
        prompts = list(prompts)
        sizes.append(len(prompts))
        return write_each(model, processor, prompts, *others)

    monkeypatch.setattr(inference, "write_each", count)
    run("inference", inference={"images": str(folder)}, generation={"batch_size": 3})
    assert sizes == [2]  # of four distinct good pictures
    assert len([json.loads(line) for line in notes.read_text().splitlines()]) == 4
    assert (read(newest("07_model_output/tiny/captions.csv"))["reason"] == "").sum() == 5


def test_a_table_names_pictures_beside_it_and_in_folders_that_are_allowed(
    trained, run, newest, folder, tmp_path_factory
):
    outside = write(tmp_path_factory.mktemp("outside") / "x.jpg", jpeg(9))
    table = folder / "wanted.csv"
    table.write_text(f"image_path,note\nb.jpg,1\ngone.jpg,2\n{outside},3\nhttp://example.com/a.jpg,4\n")
    run("inference", inference={"images": str(table)})
    reasons = [reason.partition(":")[0] for reason in read(newest("07_model_output/tiny/captions.csv"))["reason"]]
    assert reasons == ["", "missing_image", "outside_allowed_roots", "url_not_allowed"]
    run("inference", inference={"images": str(table)}, image={"allowed_roots": [str(outside.parent)]})
    assert read(newest("07_model_output/tiny/captions.csv"))["reason"][2] == ""


def test_recursive_looks_into_the_folders_too(trained, run, newest, folder):
    run("inference", inference={"images": str(folder), "recursive": True})
    assert any(
        path.endswith("deeper/e.jpg") for path in read(newest("07_model_output/tiny/captions.csv"))["image_path"]
    )


def test_what_cannot_be_captioned_at_all_says_what_to_give(trained, run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("place,caption\na.jpg,dog\n")
    with pytest.raises(ParameterError, match=r"inference.images is not set.*inference.images=path/to/folder"):
        run("inference")
    with pytest.raises(
        MissingArtifactError, match=r"Pictures not found: .*nowhere. Expected a folder, a picture, or a CSV"
    ):
        run("inference", inference={"images": "nowhere"})
    with pytest.raises(MissingArtifactError, match=r"No pictures found in .*recursive: true"):
        run("inference", inference={"images": str(tmp_path / "empty")})
    with pytest.raises(
        DataFormatError, match="needs a column for the picture, such as image_path; its first line has: place, caption"
    ):
        run("inference", inference={"images": str(tmp_path / "other.csv")})


def test_another_base_than_the_adapters_is_refused(trained, run, folder):
    with pytest.raises(AdapterError, match="base model: trained with"):
        run("inference", base="qwen2_5_vl", inference={"images": str(folder)})
