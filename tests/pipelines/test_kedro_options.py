"""Kedro's own ways to run a part, with another runner or configuration, give what a plain run gives."""

from __future__ import annotations

import shutil

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.runner import ParallelRunner, ThreadRunner

from pipelines.conftest import SLICE
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.runs.records import read_records, runs_folder


@pytest.fixture
def go(project):
    """`go(tags=["data_engineering"])`: a run of data_engineering with options of `KedroSession.run`; its record."""

    def run(conf_source=None, env=None, **options):
        given = {"conf_source": conf_source, "env": env, "runtime_params": SLICE}
        with KedroSession.create(project_path=project, **given) as session:
            session.run(**{"pipeline_names": ["data_engineering"], **options})
        return read_records(runs_folder(project, "tiny"))[-1]

    return run


def contents(record):
    return {name: artifact.get("content_sha256", artifact["sha256"]) for name, artifact in record.written.items()}


@pytest.fixture
def plain(go):
    """The record of a plain run."""
    return go()


def test_threads_write_the_same_and_are_recorded(plain, go):
    record = go(runner=ThreadRunner())
    assert record.outcome == "finished"
    assert contents(record) == contents(plain)
    assert record.id != plain.id


def test_processes_without_hooks_are_refused_before_anything_is_written(go, project):
    with pytest.raises(ParameterError, match="ParallelRunner is not supported: its processes call no hooks"):
        go(runner=ParallelRunner())
    assert not (project / "data").exists()


def test_a_tag_selects_its_pipeline(plain, go):
    assert contents(go(pipeline_names=None, tags=["data_engineering"])) == contents(plain)


def test_a_run_from_a_node_on_reads_what_is_stored_and_names_it(plain, go, capsys):
    capsys.readouterr()
    record = go(from_nodes=["split_conversations"], to_nodes=["split_conversations"])
    assert f"Data: {plain.id} of recipe tiny, made from ScenesDataset.\n" in capsys.readouterr().err
    assert record.read["conversations"]["version"] == plain.id
    assert set(record.written) == {
        *("train_conversations", "validation_conversations", "test_conversations"),
        "split_summary",
    }
    assert contents(record).items() <= contents(plain).items()


def test_the_configuration_that_a_run_stored_gives_the_same(plain, go, project):
    stored = plain.folder.relative_to(project) / "conf"
    assert contents(go(conf_source=str(stored), env="base")) == contents(plain)


def test_another_configuration_is_read_from_a_folder_and_an_archive_must_be_that_of_the_project(plain, go, project):
    elsewhere = shutil.copytree(plain.folder / "conf", project / "elsewhere")
    parameters = elsewhere / "base" / "parameters.yml"
    tree = yaml.safe_load(parameters.read_text())
    tree["split"]["seed"] = 7
    parameters.write_text(yaml.safe_dump(tree))
    record = go(conf_source="elsewhere", env="base")
    assert record.facts["parameters"]["split"]["seed"] == 7
    assert contents(record)["train_conversations"] != contents(plain)["train_conversations"]
    archive = shutil.make_archive(str(project / "packaged"), "gztar", project, "conf")
    assert contents(go(conf_source=archive)) == contents(plain)
    (project / "conf" / "base" / "globals.yml").write_text("recipe: other\n")
    with pytest.raises(ParameterError, match=r"packaged.tar.gz differs from .*conf: base/globals.yml"):
        go(conf_source=archive)
