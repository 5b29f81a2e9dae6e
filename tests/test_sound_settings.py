"""The tiny base's defaults never train another base, and nothing is evaluated without held-out pictures."""

from __future__ import annotations

import json
import logging.handlers
import math
from pathlib import Path

import pytest
import yaml
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from command_line import make_project
from qwen_vl_lora.exceptions import ParameterError, QwenVLLoraError
from qwen_vl_lora.model.families import FAMILIES, QWEN3_5
from qwen_vl_lora.model.lora_checks import missed_linear_attention
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.session import sound_settings
from qwen_vl_lora.session.sound_settings import TINY_PARAMETERS, TINY_SETTINGS, refuse_tiny_settings, stated_keys

PROJECT = Path(__file__).parents[1]
TINY_BASE = PROJECT / "data" / "06_models" / "tiny_qwen2_vl"
QWEN = "Qwen/Qwen2-VL-2B-Instruct"
OWN_CHOICE = {
    "training_args": {"learning_rate": 1e-4, "num_train_epochs": 8, "bf16": False},
    "image": {"resized_height": 112, "resized_width": 112},
    "max_length": 256,
    "generation": {"max_new_tokens": 96},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    (project / "captions.csv").write_text("image_path,caption\n")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.chdir(project)
    bootstrap_project(project)
    return project


def refusal_of(project, env, *pipelines, **given):
    """What a run says before its first node."""
    given = {"captions_file": "captions.csv", **given}
    session = KedroSession.create(project_path=project, env=env, runtime_params=given)
    with session, pytest.raises(QwenVLLoraError, match=r".") as refused:
        session.run(pipeline_names=list(pipelines))
    assert not (project / "data").exists()
    return str(refused.value)


def judged(project, env, base="a base", size=math.inf, **given):
    """None where the settings may train a base of `size` parameters, else why not."""
    with KedroSession.create(project_path=project, env=env, runtime_params=given) as session:
        context = session.load_context()
        try:
            return refuse_tiny_settings(base, size, validate_parameters(dict(context.params)), stated_keys(context))
        except ParameterError as refused:
            return str(refused)


def base_of(folder: Path, **sizes) -> Path:
    """A folder that holds a config.json alone: that of the tiny base with other sizes."""
    config = json.loads((TINY_BASE / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # a whole file without a tensor
    return folder


@pytest.mark.parametrize("env", [None, "own_captions"])
@pytest.mark.parametrize("base", [QWEN, "Qwen/Qwen2.5-VL-72B-Instruct@v1", "a folder"])
def test_a_real_base_is_not_trained_with_the_defaults_of_the_tiny_one(project, tmp_path, env, base):
    if base == "a folder":
        base = str(base_of(tmp_path / "large", vocab_size=152_064, hidden_size=1536))
    said = refusal_of(project, env, base_model=base)
    assert f"The base model is {base} (" in said
    for setting in TINY_SETTINGS:
        assert f"  {setting.name}: " in said
    assert f"--env own_captions_qwen --params captions_file=captions.csv,base_model={base}" in said


def test_the_tiny_settings_are_those_of_the_embedded_default():
    base = validate_parameters(yaml.safe_load((PROJECT / "conf/base/parameters.yml").read_text(encoding="utf-8")))
    assert {setting.name: setting.value(base) for setting in TINY_SETTINGS} == {
        setting.name: setting.tiny for setting in TINY_SETTINGS
    }


@pytest.mark.parametrize("env", ["own_captions_qwen", "qwen2_vl_2b_coco", "qwen2_5_vl_7b", "qwen3_vl_4b", "qwen3_5_4b"])
def test_the_recipes_for_real_bases_train_any_base(project, env):
    assert judged(project, env) is None


def test_settings_that_were_chosen_pass_whatever_their_values(project):
    assert judged(project, "own_captions", **OWN_CHOICE) is None
    (project / "conf" / "mine").mkdir()
    (project / "conf" / "mine" / "parameters.yml").write_text(yaml.safe_dump(OWN_CHOICE), encoding="utf-8")
    assert judged(project, "mine") is None


@pytest.mark.parametrize("setting", TINY_SETTINGS, ids=lambda setting: setting.keys[0])
def test_each_setting_that_was_left_is_named_alone(project, setting):
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in OWN_CHOICE.items()}
    for key in setting.keys:
        group, _, name = key.rpartition(".")
        if group:
            given[group].pop(name, None)
        else:
            del given[name]
    said = judged(project, "own_captions", **given)
    assert [other.name for other in TINY_SETTINGS if f"  {other.name}: " in said] == [setting.name]


def test_any_tiny_base_keeps_the_tiny_settings(project, tmp_path):
    assert judged(project, "own_captions", size=TINY_PARAMETERS) is None
    assert "billion" in judged(project, "own_captions", size=TINY_PARAMETERS + 1)
    for base in (TINY_BASE, base_of(tmp_path / "by hand", num_hidden_layers=7)):
        assert "the defaults for the tiny base" not in refusal_of(project, "own_captions", base_model=str(base))


@pytest.mark.parametrize(("env", "warned"), [("own_captions_qwen", True), ("qwen3_5_4b", False)])
def test_a_recipe_that_leaves_linear_attention_out_says_so(project, monkeypatch, env, warned):
    records = logging.handlers.BufferingHandler(1000)  # not caplog: Kedro's configuration takes its handler away
    monkeypatch.setattr(logging.getLogger(sound_settings.__name__), "handlers", [records])
    given = {"base_model": "Qwen/Qwen3.5-4B", "device": "cpu"}
    refusal_of(project, env, **given)
    lines = [record.getMessage() for record in records.buffer]
    said = [line for line in lines if "LoRA does not adapt linear attention" in line]
    assert bool(said) is warned
    assert not warned or "Add in_proj_qkv, in_proj_z, in_proj_a, in_proj_b, out_proj" in said[0]
    with KedroSession.create(project_path=project, env=env, runtime_params=given) as session:
        parameters = validate_parameters(dict(session.load_context().params))
    for family in FAMILIES:
        missed = missed_linear_attention(family, parameters.lora)
        assert bool(missed) is (warned and family is QWEN3_5)


def test_a_base_that_cannot_be_read_is_left_to_the_check_of_bases(project, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen2_vl", "hidden_size": "x"}')
    said = refusal_of(project, "own_captions", base_model=str(tmp_path / "broken"))
    assert "the defaults for the tiny base" not in said


def test_a_configuration_that_a_run_stored_was_judged_when_it_ran(project):
    stored = project / "data/08_reporting/own_captions/runs/x/conf/base"
    stored.mkdir(parents=True)
    (stored / "parameters.yml").write_text((project / "conf/base/parameters.yml").read_text(encoding="utf-8"))
    (stored / "globals.yml").write_text(f"recipe: own_captions\nbase_model: {QWEN}\n")
    (stored / "catalog.yml").write_text("{}")
    given = {"project_path": project, "conf_source": str(stored.parent), "env": "base"}
    with KedroSession.create(**given) as session:
        assert stated_keys(session.load_context()) is None


@pytest.mark.parametrize("pipelines", [(), ("evaluation",), ("data_engineering", "training", "evaluation")])
def test_nothing_is_evaluated_without_held_out_pictures(project, pipelines):
    said = refusal_of(project, None, *pipelines, split={"test_images": 0})
    assert "split.test_images is 0" in said
    assert "kedro run --pipelines data_engineering,training" in said
