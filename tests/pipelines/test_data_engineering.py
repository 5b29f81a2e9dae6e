"""The data_engineering pipeline turns a source into versioned artifacts."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from html import unescape

import pandas as pd
import pytest
from kedro.framework.session import KedroSession
from kedro.validation.type_extractor import TypeExtractor

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.parameters import (
    Parameters,
    PromptParameters,
    SplitParameters,
)
from qwen_vl_lora.pipelines.data_engineering import create_pipeline
from samples.pictures import jpeg, write

SLICE = {"captions": {"num_rows": 60}, "split": {"test_images": 6, "validation_images": 4}}


@pytest.fixture
def run_data(project):
    """`run_data(env=…, captions_file=…)`: the pipeline on a slice."""

    def go(env=None, **changes):
        parameters = {**SLICE, **changes}
        with KedroSession.create(project_path=project, env=env, runtime_params=parameters) as session:
            return session.run(pipeline_names=["data_engineering"])

    return go


@pytest.fixture
def own_file(project):
    """`own_file(["0.jpg,A dog."])`: a captions file as the project's source, in an environment of its own."""
    catalog = project / "conf" / "mine" / "catalog.yml"
    file = project / "mine" / "captions.csv"
    entry = {"type": "qwen_vl_lora.datasets.sources.CaptionsFileDataset", "filepath": str(file)}
    write(catalog, json.dumps({"captioned_images": entry}).encode())  # JSON is YAML

    def make(lines):
        write(file, "\n".join(["image_path,caption", *lines]).encode())

    return make


def load(file):
    return json.loads(file.read_text(encoding="utf-8"))


def test_node_names_are_function_names():
    assert all(node.name == node.func.__name__ for node in create_pipeline().nodes)


def test_who_moves_images_and_workspace_in_the_catalog_gets_them_there(run_data, newest, project):
    kind = "qwen_vl_lora.datasets.previews.ImageTableDataset"
    entries = {
        "images": {"type": kind, "filepath": "pictures/manifest.csv", "versioned": True},
        "workspace": {"type": "qwen_vl_lora.datasets.workspace.WorkspaceDataset", "filepath": "elsewhere/work"},
    }
    write(project / "conf/mine/catalog.yml", json.dumps(entries).encode())  # JSON is YAML
    run_data(env="mine")
    table = pd.read_csv(newest("02_intermediate/tiny/caption_table.csv"))
    for path, sha256 in zip(table["image_path"], table["sha256"], strict=True):
        assert path.startswith("pictures/files/")
        assert hashlib.sha256((project / path).read_bytes()).hexdigest() == sha256
    assert (project / "elsewhere/work/images").is_dir()
    assert not (project / "data/02_intermediate/tiny/images").exists()
    assert not (project / "data/09_workspace").exists()


def test_the_default_source_becomes_conversations_split_by_image(run_data, newest, project):
    run_data()
    table = pd.read_csv(newest("02_intermediate/tiny/caption_table.csv"))
    assert list(table.columns) == ["image_id", "image_path", "caption", "width", "height", "sha256"]
    assert len(table) == 60
    assert table["sha256"].nunique() < 60  # some images have several captions
    for path, sha256 in zip(table["image_path"], table["sha256"], strict=True):
        assert hashlib.sha256((project / path).read_bytes()).hexdigest() == sha256
    conversations = load(newest("03_primary/tiny/conversations.json"))
    assert conversations[0] == {
        "id": "identity_1",
        "conversations": [
            {
                "from": "user",
                "value": f"Describe this picture. <|vision_start|>{table['image_path'][0]}<|vision_end|>",
            },
            {"from": "assistant", "value": table["caption"][0]},
        ],
    }
    splits = [
        load(newest(f"05_model_input/tiny/{side}_conversations.json")) for side in ("train", "validation", "test")
    ]
    assert sorted(one["id"] for split in splits for one in split) == sorted(one["id"] for one in conversations)
    summary = load(newest("05_model_input/tiny/split_summary.json"))
    assert summary["images"]["test"] == 6
    assert summary["images"]["validation"] == 4
    assert set(summary["overlap"].values()) == {0}
    assert load(newest("08_reporting/tiny/caption_statistics.json"))["rows"] == 60
    assert newest("08_reporting/tiny/image_sheet.png").stat().st_size > 1000
    assert newest("08_reporting/tiny/caption_length_plot.json").exists()
    with newest("02_intermediate/tiny/rejected_samples.csv").open(newline="") as lines:
        assert list(csv.reader(lines)) == [["row", "image_id", "reason", "detail"]]


def test_a_second_run_writes_new_versions_and_no_bytes_again(run_data, newest, project):
    run_data()
    files = project / "data/02_intermediate/tiny/images/files"
    before = {file.name: file.stat().st_mtime_ns for file in files.iterdir()}
    first = newest("02_intermediate/tiny/images/manifest.csv")
    run_data()
    second = newest("02_intermediate/tiny/images/manifest.csv")
    assert first != second
    assert first.read_bytes() == second.read_bytes()
    assert {file.name: file.stat().st_mtime_ns for file in files.iterdir()} == before


def test_own_captions_keep_their_good_rows(run_data, own_file, newest, project):
    for seed in range(12):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed))
    own_file([*(f"{seed}.jpg,Picture number {seed}." for seed in range(12)), "none.jpg,A dog."])
    run_data(env="mine", recipe="mine", quarantine={"max_share": 0.5})
    with newest("02_intermediate/mine/rejected_samples.csv").open(newline="") as opened:
        (rejected,) = csv.DictReader(opened)
    assert (rejected["row"], rejected["image_id"], rejected["reason"]) == ("13", "none.jpg", "missing_image")
    assert len(load(newest("02_intermediate/mine/samples.json"))) == 12


def test_rows_that_the_data_page_lists_are_left_out_of_the_next_run(run_data, own_file, newest, project):
    for seed in range(12):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed))
    own_file([*(f"{seed}.jpg,Picture number {seed}." for seed in range(12)), "3.jpg,Picture number 3."])
    run_data(env="mine", recipe="mine")
    page = newest("08_reporting/mine/data_page.html").read_text(encoding="utf-8")
    assert "13 samples of 12 pictures, 1 row to look at" in page
    assert "the same picture and text as row 4" in page
    (cell,) = re.findall(r'data-row="(&#34;.*?)"', page)
    write(project / "mine" / "exclude.csv", f"row,image_id,source\n{unescape(cell)}\n".encode())
    run_data(env="mine", recipe="mine", captions={**SLICE["captions"], "exclude": "mine/exclude.csv"})
    assert len(load(newest("02_intermediate/mine/samples.json"))) == 12
    assert load(newest("02_intermediate/mine/collection_summary.json"))["rejected"] == {"excluded": 1}
    assert "checked" in newest("08_reporting/mine/data_page.html").read_text(encoding="utf-8")


def test_a_list_of_another_source_is_refused_before_the_first_node(run_data, own_file, project):
    for seed in range(12):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed))
    own_file([f"{seed}.jpg,Picture number {seed}." for seed in range(12)])
    write(project / "mine" / "exclude.csv", b"row,image_id\n4,2.jpg\n")
    with pytest.raises(DataFormatError, match=r"row 4 with the image_id '2.jpg', but row 4 of the source has '3.jpg'"):
        run_data(env="mine", recipe="mine", captions={**SLICE["captions"], "exclude": "mine/exclude.csv"})
    assert not (project / "data/02_intermediate/mine").exists()


def test_an_empty_source_publishes_nothing(run_data, own_file, project):
    own_file([])
    with pytest.raises(DataFormatError, match="no rows"):
        run_data(env="mine", recipe="mine")
    assert not (project / "data/02_intermediate/mine").exists()


def test_too_many_bad_rows_publish_nothing(run_data, own_file, project):
    own_file(["none.jpg,A dog."] * 3)
    with pytest.raises(DataFormatError, match="3 of 3 rows of `captioned_images`"):
        run_data(env="mine", recipe="mine")
    assert not (project / "data/02_intermediate/mine").exists()


def test_parameters_arrive_typed():
    assert TypeExtractor({"data_engineering": create_pipeline()}).extract_types_from_pipelines() == {
        "prompt": PromptParameters,
        "split": SplitParameters,
        "settings": Parameters,
    }
