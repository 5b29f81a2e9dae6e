"""`qwen-vl-lora look` says what data_engineering would do with captions, and writes nothing."""

from __future__ import annotations

import csv
import io
import json
import time

import pytest
from click.testing import CliRunner
from kedro.framework.startup import bootstrap_project

from command_line import call, kedro_run, make_project
from qwen_vl_lora.commands.look import look as command
from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, ParameterError
from samples.pictures import jpeg, write


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


@pytest.fixture
def look(project, monkeypatch):
    monkeypatch.chdir(project)
    bootstrap_project(project)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(command, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def table(folder, rows, header=("image_path", "caption")) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return str(write(folder / "captions.csv", text.getvalue().encode()))


def mixed(project) -> str:
    for seed in range(12):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed, (40 + seed, 30)))
    write(project / "mine" / "page.jpg", b"<html>")
    good = [[f"{seed}.jpg", f"Of  {seed}.", "x"] for seed in range(12)]
    bad = [["gone.jpg", "A dog.", ""], ["page.jpg", "A dog.", ""], ["1.jpg", "None", ""], ["2.jpg", "", ""]]
    return table(project / "mine", good + bad, ("image_path", "caption", "mood"))


def files(project):
    return {path: path.stat().st_mtime_ns for path in project.rglob("*") if path.is_file()}


def test_nothing_is_written(project, look):
    file = mixed(project)
    before = files(project)
    look(file)
    look(file, "--json")
    assert files(project) == before
    assert not (project / "data").exists()


def test_it_says_what_data_engineering_then_does(project, look):
    file = mixed(project)
    foreseen = json.loads(look(file, "--json"))
    done = call(
        kedro_run(
            "data_engineering",
            env="own_captions",
            captions_file=file,
            captions__num_rows=1000,
            quarantine__max_share=0.9,
        ),
        project,
    )
    assert done.returncode == 0, done.stderr
    (stored,) = (project / "data/02_intermediate/own_captions/collection_summary.json").glob("*/*.json")
    summary = json.loads(stored.read_text(encoding="utf-8"))
    assert {key: foreseen[key] for key in summary} == summary
    assert summary["rejected"] == {"empty_caption": 2, "missing_image": 1, "not_an_image": 1}
    (rejected,) = (project / "data/02_intermediate/own_captions/rejected_samples.csv").glob("*/*.csv")
    with rejected.open(encoding="utf-8", newline="") as lines:
        reasons = [(int(row["row"]), row["reason"]) for row in csv.DictReader(lines)]
    assert [(row["row"], row["reason"]) for row in foreseen["examples"]] == reasons
    said = " ".join((done.stdout + done.stderr).split())
    assert "rejected 4 of 16 rows: empty_caption 2, missing_image 1, not_an_image 1; see data/02_intermediate/" in said
    assert said.count("rejected 4 of 16 rows") == 1
    assert "not read: mood (12 rows)" in said


def test_a_person_reads_counts_lengths_and_the_first_rejected_rows(project, look):
    said = look(mixed(project))
    assert "16 rows: 12 samples of 12 pictures kept, 4 rows rejected" in said
    assert "a run would stop: 25.0% of the rows are bad; quarantine.max_share allows 10.0%" in said
    assert "form of the rows: caption" in said
    assert "answers: 2 to 2 words, median 2; 5 to 6 characters, median 5" in said
    assert "pictures: 40x30 to 51x30 pixels, median 46x30" in said
    assert "cleaning changed 12 texts" in said
    assert "row 13: missing_image" in said
    assert "would stop" not in look(mixed(project), "--params", "quarantine.max_share=0.5")


def test_ten_thousand_rows_of_three_hundred_pictures_take_seconds(project, look):
    for seed in range(300):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed, (320, 240)))
    file = table(project / "mine", [[f"{row % 300}.jpg", f"Caption {row} of a picture."] for row in range(10_000)])
    begin = time.process_time()
    said = look(file)
    assert "10000 rows: 10000 samples of 300 pictures kept" in said
    assert time.process_time() - begin < 10


def test_settings_are_those_of_a_run(project, look):
    write(project / "pictures" / "a.jpg", jpeg())
    file = table(project / "mine", [["a.jpg", "Ein Hund.", "A dog."]], ("foto", "de", "en"))
    words = "captions.columns.image=foto,captions.columns.caption=en"
    facts = json.loads(look(file, "--image-folder", str(project / "pictures"), "--params", words, "--json"))
    assert (facts["samples"], facts["ignored_keys"]) == (1, {"de": 1})


def test_a_folder_of_pictures_with_texts_beside_is_looked_at(project, look):
    for seed in range(3):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed))
        write(project / "mine" / f"{seed}.txt", f"Picture {seed}.".encode())
    assert "3 rows: 3 samples of 3 pictures kept, 0 rows rejected" in look(str(project / "mine"))


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("none.csv", None, MissingArtifactError, "not found"),
        ("empty.csv", b"", DataFormatError, "is empty"),
        ("lfs.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n", DataFormatError, "Git LFS"),
        ("two.csv", b"image,file_name,caption\na.jpg,b.jpg,A dog.\n", DataFormatError, "captions.columns.image="),
    ],
)
def test_what_cannot_be_read_is_one_message(project, look, name, content, error, words):
    if content is not None:
        write(project / name, content)
    with pytest.raises(Exception, match=words) as fault:
        look(name)
    assert isinstance(fault.value, error) or isinstance(fault.value.__cause__, error)


def test_a_wrong_parameter_is_one_message(project, look):
    with pytest.raises(ParameterError, match="captions"):
        look("c.csv", "--params", "captions.sampling=some")


def test_the_help_says_what_it_does_and_that_nothing_is_written(look):
    said = " ".join(look("--help").split())
    assert "Show what data_engineering would keep and reject of CAPTIONS" in said
    assert "Nothing is written" in said
