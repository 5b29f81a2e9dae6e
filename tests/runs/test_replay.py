"""A stored configuration gives values; one from elsewhere can do nothing more."""

import shutil
from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.runs.replay import check_foreign_configuration, replay_options, stored_configuration

CONF = Path(__file__).parents[2] / "conf"
SAMPLES = {
    "type": "qwen_vl_lora.datasets.artifacts.ArtifactDataset",
    "dataset": {"type": "json.JSONDataset"},
    "filepath": "data/02_intermediate/tiny/samples.json",
    "versioned": True,
}


@pytest.fixture
def foreign(tmp_path):
    """`foreign(samples={…})`: a stored configuration, as somebody may have changed it."""

    def make(file="base/catalog.yml", **entries):
        path = tmp_path / "conf" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(entries))
        return tmp_path / "conf"

    return make


def test_an_unchanged_entry_is_accepted(foreign):
    check_foreign_configuration(foreign(samples=SAMPLES), CONF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "pickle.PickleDataset"}, "uses the dataset type 'pickle.PickleDataset'"),
        ({"type": "os.system"}, "uses the dataset type 'os.system'"),
        ({"dataset": "api.APIDataset"}, "uses the dataset type 'api.APIDataset'"),
        ({"dataset": {"type": "json.JSONDataset", "fs_args": {"project": "x"}}}, "has the key 'fs_args'"),
        ({"validator": "subprocess.run"}, "has the key 'validator'"),
        ({"filepath": "../../.bashrc"}, "filepath must lie below data/"),
        ({"filepath": "/etc/passwd"}, "filepath must lie below data/"),
        ({"filepath": "https://example.org/x.json"}, "filepath must lie below data/"),
        ({"filepath": "${oc.env:HOME}/x"}, "contains an interpolation"),
    ],
)
def test_a_changed_entry_is_refused(foreign, change, message):
    with pytest.raises(ParameterError, match=message):
        check_foreign_configuration(foreign(samples={**SAMPLES, **change}), CONF)


@pytest.mark.parametrize(
    "file", ["base/parameters.yml", "base/globals.yml", "base/credentials.yml", "local/deep/a.json"]
)
def test_interpolations_are_refused_in_every_file(foreign, file):
    with pytest.raises(ParameterError, match="may give values only"):
        check_foreign_configuration(foreign(file, prompt={"user": "${oc.env:AWS_SECRET_ACCESS_KEY}"}), CONF)


@pytest.mark.parametrize("file", ["base/catalog_more.yml", "base/catalog/deep/a.yml", "local/x/catalog.json"])
def test_every_file_that_kedro_takes_for_a_catalog_is_checked(foreign, file):
    with pytest.raises(ParameterError, match=r"pickle\.PickleDataset"):
        check_foreign_configuration(foreign(file, samples={**SAMPLES, "type": "pickle.PickleDataset"}), CONF)


def test_a_dataset_of_the_hub_that_the_project_does_not_use_is_refused(foreign):
    """Such a dataset may be a script."""
    entry = {
        "type": "qwen_vl_lora.datasets.hub.HubCaptionsDataset",
        "dataset": "somebody/else@master",
        "trust_remote_code": True,
    }
    with pytest.raises(ParameterError, match="somebody/else@master"):
        check_foreign_configuration(foreign(captioned_images=entry), CONF)


def test_an_archive_is_refused(tmp_path):
    archive = shutil.make_archive(str(tmp_path / "conf"), "gztar", CONF)
    with pytest.raises(ParameterError, match="expected a folder"):
        check_foreign_configuration(Path(archive), CONF)


def test_secrets_are_left_out_of_the_stored_configuration():
    files = stored_configuration(
        {}, {"training_args": {"hub_token": "abc", "seed": 1}}, {"recipe": "tiny"}, {"run": {}}
    )
    assert yaml.safe_load(files["conf/base/parameters.yml"]) == {"training_args": {"seed": 1}}


def test_replay_pins_free_inputs_in_kedros_own_notation():
    options = replay_options(
        "runs/r1", ["training"], {"images": "d1", "train_conversations": "d2"}, {"tags": ("a", "b")}
    )
    assert options["run"] == {
        "conf_source": "runs/r1/conf",
        "env": "base",
        "pipelines": "training",
        "load_versions": "images:d1,train_conversations:d2",
        "tags": "a,b",
    }
