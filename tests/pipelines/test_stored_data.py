"""A run reads stored data only where its parameters would have made the same."""

import csv
import json
import shutil

import pytest

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.session.stored_data import DECIDED_BY, Stated, _differences
from samples.pictures import jpeg, write

OWN_QUESTION = "COCO Yes:"


@pytest.fixture
def table(tmp_path_factory):
    """`table("a")`: a CSV with 14 captions of 14 pictures in a folder of its own."""

    def make(name):
        folder = tmp_path_factory.mktemp(name)
        rows = [(f"{number}.jpg", f"picture {number} of {name}") for number in range(14)]
        for number, (picture, _) in enumerate(rows):
            write(folder / picture, jpeg(number))
        with (folder / "captions.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image_path", "caption"), *rows])
        return folder / "captions.csv"

    return make


def with_own_questions(table):
    """The same as the tutorials' JSON, each sample with its question."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = [
        {
            "id": f"identity_{number}",
            "conversations": [
                {"from": "user", "value": f"{OWN_QUESTION} <|vision_start|>{row['image_path']}<|vision_end|>"},
                {"from": "assistant", "value": row["caption"]},
            ],
        }
        for number, row in enumerate(rows, start=1)
    ]
    file = table.with_name("data_vl.json")
    file.write_text(json.dumps(records))
    return file


def refused(run, *pipelines, **changes):
    with pytest.raises(ParameterError, match="The stored data were made with other parameters") as error:
        run(*pipelines, **changes)
    return str(error.value)


def records(project):
    return sorted((project / "data" / "08_reporting").glob("*/runs/*"))


DECIDING = [
    ("captions", "num_rows", 30, "40 → 30"),
    ("captions", "collapse_whitespace", False, "auto → False"),
    ("image", "max_source_pixels", 10**6, "100000000 → 1000000"),
    ("image", "max_aspect_ratio", 3, "200 → 3"),
    ("image", "allowed_roots", ["/photos"], r"[] → ['/photos']"),
    ("image", "allow_urls", True, "False → True"),
    ("quarantine", "max_share", 0.5, "0.1 → 0.5"),
    ("split", "test_images", 7, "6 → 7"),
    ("split", "seed", 43, "42 → 43"),
    ("prompt", "user", "What is this?", "Describe this picture. → What is this?"),
    ("prompt", "system", "Be brief.", "None → Be brief."),
]


def test_every_parameter_that_decides_the_data_is_refused_where_it_is_another(run, project):
    run("data_engineering")
    before = records(project)
    changes: dict = {}
    for group, key, value, _ in DECIDING:
        changes.setdefault(group, {})[key] = value
    message = refused(run, "training", **changes)
    assert (
        "Make the data again with the parameters of this run: kedro run --pipeline data_engineering --params" in message
    )
    for group, key, value, shown in DECIDING:
        assert f"{group}.{key}: {shown}\n" in message, message
        if not isinstance(value, list):
            assert f"{group}.{key}={str(value).lower() if isinstance(value, bool) else value}" in message
    message = refused(run, "training", split={"seed": 1})
    assert "(data → this run):\n  split.seed: 42 → 1\nMake" in message
    assert records(project) == before


def test_parameters_that_leave_the_data_as_they_are_may_differ(run):
    run("data_engineering")
    others = {
        "image": {"resized_height": 56, "resized_width": 84, "url_timeout": 1.0},
        "captions": {"seed": 5},  # of a random sample; the first rows are taken
        "max_length": 300,
        "lora": {"r": 4},
        "training_args": {"max_steps": 1, "learning_rate": 1e-5},
    }
    run("training", **others)


def test_another_file_than_that_of_the_data_is_refused_and_none_takes_the_stored_data(run, table):
    one, other = table("a"), table("b")
    own = {"env": "own_captions", "split": {"test_images": 2, "validation_images": 0}}
    steps = {"training_args": {"max_steps": 1, "eval_strategy": "no"}}
    run("data_engineering", captions_file=str(one), **own)
    message = refused(run, "training", captions_file=str(other), **own, **steps)
    assert f"captions_file: {one} → {other}" in message
    assert "kedro run --env own_captions --pipeline data_engineering" in message
    assert f"captions_file={other}" in message
    link = one.with_name("link.csv")
    link.symlink_to(one)
    run("training", captions_file=str(link), **own, **steps)
    run("training", **own, **steps)


def test_a_prompt_counts_as_far_as_it_is_written_into_conversations(run, table, newest):
    own = {"env": "own_captions", "split": {"test_images": 2, "validation_images": 0}}
    steps = {"training_args": {"max_steps": 1, "eval_strategy": "no"}}
    run("data_engineering", captions_file=str(with_own_questions(table("a"))), **own)
    message = refused(run, "training", prompt={"override": True}, **own, **steps)
    assert "prompt.override: False → True" in message
    run("training", prompt={"user": "Never asked."}, **own, **steps)
    record = json.loads((newest("06_models/own_captions/adapter") / "adapter_record.json").read_text())
    assert record["prompt"] == {"user": OWN_QUESTION, "system": None, "override": False}
    run("evaluation", **own)  # what is configured is asked of nobody
    predictions = newest("07_model_output/own_captions/predictions.csv").read_text().splitlines()
    assert all(f",{OWN_QUESTION}," in line for line in predictions[1:])
    folder = newest("06_models/own_captions/adapter").parents[2] / "pics"
    picture = write(folder / "a.jpg", jpeg(1))
    run("inference", inference={"images": str(picture)}, **own)


def test_a_part_of_the_data_that_is_made_anew_takes_its_new_parameters(run, project):
    run("data_engineering")
    from kedro.framework.session import KedroSession

    from pipelines.conftest import SLICE

    split = {"split": {**SLICE["split"], "test_images": 8}}
    with KedroSession.create(project_path=project, runtime_params={**SLICE, **split}) as session:
        session.run(from_nodes=["split_conversations"], pipeline_names=["data_engineering"])
    assert "split.test_images: 8 → 6" in refused(run, "training")
    assert "captions.num_rows: 40 → 41" in refused(run, "training", captions={"num_rows": 41}, **split)


def test_data_without_a_record_are_read_as_they_are(run, project):
    run("data_engineering")
    shutil.rmtree(project / "data" / "08_reporting" / "tiny" / "runs")
    run("training", split={"seed": 43}, training_args={"max_steps": 1})


def test_a_source_of_a_run_before_sources_had_a_folder_has_none():
    described = {"type": "CaptionsFileDataset", "filepath": "captions.csv"}
    then = Stated({}, {}, described)
    assert _differences(then, Stated({}, {}, {**described, "image_folder": None}), DECIDED_BY["samples"]) == []
    (found,) = _differences(then, Stated({}, {}, {**described, "image_folder": "pictures"}), DECIDED_BY["samples"])
    assert str(found) == "captioned_images.image_folder: None → pictures"
