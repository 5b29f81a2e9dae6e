"""A saved version is whole or absent, and a run reads back its own."""

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest
from kedro.io import DatasetError, Version

from qwen_vl_lora.datasets.adapter import StagedDirectoryDataset
from qwen_vl_lora.datasets.artifacts import ArtifactDataset


def json_dataset(folder, save=None, load=None):
    return ArtifactDataset(
        filepath=str(folder / "numbers.json"), dataset="json.JSONDataset", version=Version(load, save)
    )


def test_what_was_saved_is_loaded(tmp_path):
    json_dataset(tmp_path, "v1").save({"a": 1})
    assert json_dataset(tmp_path).load() == {"a": 1}


def test_a_run_reads_back_its_own_version_though_a_later_one_is_there(tmp_path):
    ours = json_dataset(tmp_path, "2026-01-01T00.00.00.000Z")
    ours.save({"run": "ours"})
    json_dataset(tmp_path, "2026-01-02T00.00.00.000Z").save({"run": "theirs"})
    ours.release()
    assert ours.load() == {"run": "ours"}


def test_a_run_reads_back_its_own_version_though_an_older_one_is_pinned(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    pinned = json_dataset(tmp_path, save="v2", load="v1")
    pinned.save(2)
    assert pinned.load() == 2


def test_a_pinned_version_is_read_and_the_save_version_stays(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    json_dataset(tmp_path, "v2").save(2)
    dataset = json_dataset(tmp_path, "v3")
    dataset.pin("v1")
    assert dataset.load() == 1
    assert dataset.versions() == ["v2", "v1"]
    dataset.save(3)
    assert dataset.load() == 3
    assert json_dataset(tmp_path).load() == 3


def test_the_newest_version_is_that_of_the_last_run_though_the_clock_went_back(tmp_path):
    folder = tmp_path / "data/06_models/tiny"
    for sequence, run_id in enumerate(("2026-05-01T00.00.00.000Z", "2026-01-01T00.00.00.000Z"), start=1):
        json_dataset(folder, run_id).save(sequence)
        run = tmp_path / "data/08_reporting/tiny/runs" / run_id
        run.mkdir(parents=True)
        facts = {"format": 1, "id": run_id, "recipe": "tiny", "outcome": "finished", "sequence": sequence}
        (run / "record.json").write_text(json.dumps({**facts, "datasets": {"read": {}, "written": {}}}))
    newest = json_dataset(folder)
    assert newest.versions()[0] == "2026-01-01T00.00.00.000Z"
    assert newest.load() == 2
    assert newest.resolve_load_version() == "2026-01-01T00.00.00.000Z"


def test_a_missing_version_names_those_that_are_there(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    with pytest.raises(DatasetError, match=r"version v9 of .*versions found: v1"):
        json_dataset(tmp_path, load="v9").load()


def test_a_failed_save_leaves_nothing_and_the_old_version_stays(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    with pytest.raises(DatasetError, match="not JSON serializable"):
        json_dataset(tmp_path, "v2").save({"a": object()})
    assert json_dataset(tmp_path).load() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    assert os.listdir(tmp_path / "numbers.json") == ["v1"]


def test_the_same_version_is_never_overwritten(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    with pytest.raises(DatasetError, match="must not exist"):
        json_dataset(tmp_path, "v1").save(2)
    assert json_dataset(tmp_path).load() == 1


def test_published_folders_are_readable_by_others(tmp_path):
    json_dataset(tmp_path, "v1").save(1)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "numbers.json" / "v1").stat().st_mode & 0o777 == 0o777 & ~umask


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from kedro.io import Version
from qwen_vl_lora.datasets import artifacts

def die(folder):  # everything is written, nothing renamed
    os.kill(os.getpid(), signal.SIGKILL)

artifacts.sync_tree = die
stock = {"json": "json.JSONDataset", "csv": {"type": "pandas.CSVDataset"}, "txt": "text.TextDataset"}
import pandas as pd
values = {"json": [2], "csv": pd.DataFrame({"a": [2]}), "txt": "two"}
kind, folder = sys.argv[1:]
dataset = artifacts.ArtifactDataset(f"{folder}/value.{kind}", stock[kind], Version(None, "v2"))
dataset.save(values[kind])
"""


@pytest.mark.parametrize("kind", ["json", "csv", "txt"])
def test_a_kill_during_a_save_leaves_the_old_version_newest(tmp_path, kind):
    stock = {"json": "json.JSONDataset", "csv": {"type": "pandas.CSVDataset"}, "txt": "text.TextDataset"}[kind]
    value = {"json": [1], "csv": pd.DataFrame({"a": [1]}), "txt": "one"}[kind]
    path = str(tmp_path / f"value.{kind}")
    ArtifactDataset(path, stock, Version(None, "v1")).save(value)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, kind, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    dataset = ArtifactDataset(path, stock, Version(None, None))
    assert dataset.resolve_load_version() == "v1"
    assert str(dataset.load()) == str(ArtifactDataset(path, stock, Version("v1", None)).load())


def test_the_stock_datasets_preview_is_kept(tmp_path):
    import inspect

    dataset = ArtifactDataset(str(tmp_path / "t.csv"), {"type": "pandas.CSVDataset"}, Version(None, "v1"))
    dataset.save(pd.DataFrame({"a": range(9)}))
    assert "TablePreview" in str(inspect.signature(dataset.preview).return_annotation)
    assert len(dataset.preview(nrows=3)["data"]) == 3


def test_a_staged_directory_is_moved_into_place(tmp_path):
    staged = tmp_path / "staged"
    staged.mkdir()
    (staged / "weights").write_text("w")
    dataset = StagedDirectoryDataset(str(tmp_path / "model"), Version(None, "v1"))
    dataset.save(staged)
    assert (dataset.load() / "weights").read_text() == "w"
    assert not staged.exists()


def test_an_unversioned_directory_is_replaced_whole(tmp_path):
    for content in ("old", "new"):
        staged = tmp_path / content
        staged.mkdir()
        (staged / content).write_text(content)
        StagedDirectoryDataset(str(tmp_path / "model")).save(staged)
    assert os.listdir(tmp_path / "model") == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["model"]


@pytest.mark.parametrize(
    ("dataset", "value"),
    [
        ({"type": "json.JSONDataset", "save_args": {"ensure_ascii": False}}, {"caption": "一只狗 é"}),
        ({"type": "pandas.CSVDataset", "save_args": {"index": False}}, [["一只狗 é"]]),
        ({"type": "text.TextDataset"}, "一只狗 é"),
        ({"type": "json.JSONDataset", "fs_args": {"open_args_save": {"mode": "w"}}}, {"caption": "一只狗 é"}),
    ],
    ids=["json", "csv", "text", "own fs_args"],
)
def test_texts_are_utf8_whatever_the_locale(tmp_path, dataset, value):
    script = f"""
import pandas as pd
from qwen_vl_lora.datasets.artifacts import ArtifactDataset
value = {value!r}
value = pd.DataFrame(value, columns=["caption"]) if isinstance(value, list) else value
artifact = ArtifactDataset(filepath={str(tmp_path / "file")!r}, dataset={dataset!r})
artifact.save(value)
read = artifact.load()
assert read.equals(value) if hasattr(value, "equals") else read == value
"""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env={**os.environ, **ascii_only}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    stored = (tmp_path / "file").read_text(encoding="utf-8")
    assert "é" in stored or "\\u00e9" in stored


def test_an_encoding_that_the_catalog_names_stays(tmp_path):
    stock = {"type": "text.TextDataset", "fs_args": {"open_args_save": {"encoding": "latin-1"}}}
    ArtifactDataset(filepath=str(tmp_path / "file"), dataset=stock).save("é")
    assert (tmp_path / "file").read_bytes() == b"\xe9"
