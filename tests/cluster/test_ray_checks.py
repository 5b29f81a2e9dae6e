"""What a machine of a cluster must have, without a cluster."""

import importlib.util

import pytest

from cluster.works import cluster
from qwen_vl_lora.cluster import ray_cluster
from qwen_vl_lora.exceptions import ClusterError
from qwen_vl_lora.model.base_model import BaseModel, difference_of


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(…)`: what a machine says that has everything but what is given."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mark").touch()
    usual = {"project": tmp_path, "mark": tmp_path / "mark", "look": str}
    return lambda versions=(), **changes: ray_cluster._look(
        {**ray_cluster._versions(), **dict(versions)}, **{**usual, **changes}
    )


def test_a_machine_that_has_everything_says_nothing(machine):
    assert machine() == ""


def test_other_versions_are_named(machine):
    assert machine(versions={"peft": "0.1"}).startswith("has other versions: peft ")
    assert " in place of 0.1. Install the same" in machine(versions={"peft": "0.1"})


def test_a_machine_that_asks_for_no_token_is_named(machine, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert machine().startswith("asks for no token, so everybody who reaches it may run programs there")


def test_a_project_that_is_not_shared_is_named(machine, tmp_path):
    assert f"does not see {tmp_path}. The project folder" in machine(mark=tmp_path / "elsewhere")


def test_a_base_that_differs_is_named(machine, base_path, tmp_path):
    base = BaseModel("base", base_path("qwen2_vl"))
    assert machine(look=lambda: difference_of(base.path, base.files)) == ""
    assert "has no base model" in machine(look=lambda: difference_of(tmp_path / "none", base.files))
    assert "has other files of the base model" in machine(look=lambda: difference_of(base.path, {}))


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"cluster.address needs Ray, .*: pip install -e '\.\[cluster\]'"):
        ray_cluster.find_places(cluster(address="auto"), "cpu")
