"""The `base_model` entry: a folder or a model of the hub, the same handle for both."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from kedro.config import OmegaConfigLoader
from kedro.io import DatasetError

from conftest import PROJECT
from hub.hugging_face import hugging_face  # noqa: F401
from hub.loopback import MODEL, files_of, hub  # noqa: F401
from qwen_vl_lora.datasets.base_model import BaseModelDataset
from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.settings import CONFIG_LOADER_ARGS


def test_a_folder_is_a_base_model(base_path):
    folder = base_path("qwen2_vl")
    dataset = BaseModelDataset(model=str(folder))
    dataset.check()
    handle = dataset.load()
    assert (handle.path, handle.revision, dataset.exists()) == (folder, None, True)
    assert dataset.load() is handle  # its fingerprint is computed once in a run


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_model_of_the_hub_is_the_same_base_model(hub, base_path, family):  # noqa: F811
    hub.add_model(MODEL, files_of(base_path(family)), revision="v1.0")
    dataset = BaseModelDataset(model=f"{MODEL}@v1.0")
    assert not dataset.exists()
    dataset.check()
    assert hub.asked_for("config.json") == []  # looking downloads nothing
    handle = dataset.load()
    assert (handle.name, handle.revision) == (MODEL, "v1.0")
    assert handle.fingerprint == BaseModelDataset(model=str(base_path(family))).load().fingerprint
    assert dataset.exists()


@pytest.mark.parametrize("settings", [{"model": f"hf:{MODEL}@v1.0"}, {"model": f"{MODEL}@v1.0", "hub": "huggingface"}])
def test_a_model_of_hugging_face_is_named_with_its_hub(hugging_face, base_path, settings):  # noqa: F811
    hugging_face.add_model(MODEL, files_of(base_path("qwen2_vl")), revision="v1.0")
    dataset = BaseModelDataset(**settings)
    assert not dataset.exists()
    dataset.check()
    assert hugging_face.asked_for("config.json") == []  # looking downloads nothing
    handle = dataset.load()
    assert (handle.name, handle.revision) == (f"hf:{MODEL}", "v1.0")
    assert handle.fingerprint == BaseModelDataset(model=str(base_path("qwen2_vl"))).load().fingerprint
    hugging_face.stop()
    BaseModelDataset(**settings).check()


@pytest.mark.parametrize("name", ["hf:Qwen", "hf:../Qwen/a", "ms:owner/name@", "hf:owner/na me"])
def test_a_name_on_a_hub_that_is_misspelt_is_refused_with_the_right_form(name):
    with pytest.raises(
        DatasetError, match=rf"base_model: expected {name[:3]}owner/name or {name[:3]}owner/name@revision"
    ):
        BaseModelDataset(model=name)


def test_another_hub_is_refused_with_the_two_that_there_are():
    with pytest.raises(DatasetError, match=r"hub must be modelscope or huggingface; got 'hf'. Set hub in globals.yml"):
        BaseModelDataset(model=MODEL, hub="hf")


@pytest.mark.parametrize(("chosen", "asked"), [("modelscope", "hub"), ("huggingface", "hugging_face")])
def test_globals_yml_names_the_hub_of_names_without_a_prefix(chosen, asked, hub, hugging_face, tmp_path):  # noqa: F811
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    shared = conf / "base" / "globals.yml"
    shared.write_text(shared.read_text().replace("hub: modelscope", f"hub: {chosen}"))
    loader = OmegaConfigLoader(str(conf), env="own_captions_qwen", **CONFIG_LOADER_ARGS)
    entry = {name: value for name, value in loader["catalog"]["base_model"].items() if name != "type"}
    hugging_face.add_model(MODEL, {})
    BaseModelDataset(**entry).check()
    assert [bool(server.requests) for server in (hub, hugging_face)] == [asked == "hub", asked == "hugging_face"]


def test_a_folder_that_is_there_wins_over_the_hub(hub, base_path, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    (tmp_path / MODEL).symlink_to(base_path("qwen2_vl"))
    assert BaseModelDataset(model=MODEL).load().revision is None
    assert hub.requests == []


def test_no_network_and_no_snapshot_stops_at_the_look_before_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    dataset = BaseModelDataset(model=MODEL)
    with pytest.raises(MissingArtifactError, match="cannot be reached"):
        dataset.check()
    with pytest.raises(DatasetError, match="cannot be reached"):
        dataset.load()


def test_a_verified_snapshot_needs_no_network(hub, base_path, monkeypatch):  # noqa: F811
    hub.add_model(MODEL, files_of(base_path("qwen2_vl")))
    BaseModelDataset(model=MODEL).load()
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    dataset = BaseModelDataset(model=MODEL)
    dataset.check()
    assert dataset.load().path.is_dir()


def test_a_path_that_is_no_hub_id_is_named_as_a_missing_folder():
    with pytest.raises(MissingArtifactError, match="no/such/model not found"):
        BaseModelDataset(model="no/such/model").check()


def test_a_base_model_cannot_be_written(base_path):
    with pytest.raises(DatasetError, match="read-only"):
        BaseModelDataset(model=str(base_path("qwen2_vl"))).save(base_path("qwen2_vl"))


def test_the_entry_is_made_without_the_client_and_without_torch():
    code = (
        "import sys\nfrom qwen_vl_lora.datasets.base_model import BaseModelDataset\n"
        f"BaseModelDataset(model={MODEL!r})\n"
        "sys.exit(bool({'torch', 'modelscope', 'modelscope_hub', 'requests'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("named", [{}, {"model": "a/b", "filepath": "c"}])
def test_one_name_is_needed(named):
    with pytest.raises(DatasetError, match="one of the two"):
        BaseModelDataset(**named)
