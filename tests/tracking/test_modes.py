"""What has to be there for a mode is looked at before anything runs."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import SwanLabParameters
from qwen_vl_lora.tracking.swanlab import checked_mode, ignored_variables, resolve_mode, writer_environment


def settings(mode):
    return SwanLabParameters(mode=mode, project="p", experiment_name="e", workspace=None, prediction_images=1)


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path))


def test_auto_is_online_where_there_is_a_key(monkeypatch):
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    assert resolve_mode("auto") == "online"
    assert resolve_mode("offline") == "offline"


@pytest.mark.skipif(importlib.util.find_spec("swanboard") is not None, reason="the board is installed")
def test_local_without_its_board_names_the_remedy():
    with pytest.raises(ParameterError, match=r"pip install 'swanlab\[dashboard\]', or set swanlab.mode: offline"):
        checked_mode(settings("local"))


def test_online_without_a_key_names_the_remedy(monkeypatch, tmp_path):
    with pytest.raises(ParameterError, match="there is no key: set SWANLAB_API_KEY in the environment"):
        checked_mode(settings("online"))
    (tmp_path / ".netrc").write_text("machine api.swanlab.cn\nlogin x\npassword y\n")
    checked_mode(settings("online"))


@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_what_needs_nothing_is_let_through(mode):
    checked_mode(settings(mode))


def test_only_an_online_writer_hears_of_the_key(monkeypatch, tmp_path):
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    monkeypatch.setenv("SWANLAB_PROJECT", "qwen")
    offline = writer_environment("offline", tmp_path)
    assert "key" not in offline.values()
    online = writer_environment("online", tmp_path)
    assert online["SWANLAB_API_KEY"] == "key"
    assert "SWANLAB_PROJECT" not in online | offline


def test_variables_that_say_something_else_are_named():
    found = {"SWANLAB_PROJECT": "a", "SWANLAB_API_KEY": "b", "SWANLAB_DASHBOARD_PORT": "1", "PATH": "c"}
    assert ignored_variables(found) == ["SWANLAB_PROJECT"]


@pytest.mark.parametrize(
    "env", ["base", "own_captions", "own_captions_qwen", "qwen2_5_vl_7b", "qwen3_vl_4b", "qwen3_5_4b"]
)
def test_own_captions_stay_on_the_machine_whatever_the_environment_holds(monkeypatch, env):
    monkeypatch.setenv("SWANLAB_API_KEY", "key")
    merged = {}
    for name in ("base", env):
        file = Path(__file__).parents[2] / "conf" / name / "parameters.yml"
        merged |= yaml.safe_load(file.read_text(encoding="utf-8")).get("swanlab", {})
    assert resolve_mode(SwanLabParameters.model_validate(merged).mode) == "offline"
