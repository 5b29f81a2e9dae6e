"""The export pipeline publishes a merged model with a card whose own code works."""

import json
import re
import subprocess
import sys

import pytest
from peft import PeftModel

from qwen_vl_lora.exceptions import AdapterError
from qwen_vl_lora.pipelines.export import create_pipeline
from qwen_vl_lora.texts import visible
from samples.pictures import picture

SETTINGS = {"training_args": {"learning_rate": 0.02, "max_steps": 4}}


@pytest.fixture
def trained(run, once):
    """The default data and an adapter that changes captions."""

    def make():
        run("data_engineering")
        run("training", **SETTINGS)

    once("trained by large steps", make)


def output_of(command, folder):
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")[-1]  # Kedro names its logging configuration before it


def test_node_names_are_function_names():
    assert all(node.name == node.func.__name__ for node in create_pipeline().nodes)


SLOW_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")]


@pytest.mark.parametrize("family", ["qwen2_vl", *SLOW_FAMILIES])
def test_the_cards_own_code_gives_the_caption_of_base_and_adapter(run, newest, base_path, project, tmp_path, family):
    run("data_engineering")
    for pipeline in ("training", "evaluation", "export"):
        run(pipeline, base=family, rows="separate" if family == "qwen3_5" else "shared", **SETTINGS)
    card = (newest("06_models/tiny/merged_model") / "README.md").read_text(encoding="utf-8")
    for part in (
        "| CIDEr |",
        "## Licences",
        "Describe this picture.",
        "## Merging",
    ):
        assert part in card
    assert "base_model:" not in card.split("---")[1]  # of this base, which is a folder and on no hub
    picture(3, (120, 90)).save(tmp_path / "picture.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/to/this/folder", str(newest("06_models/tiny/merged_model")))
    ours = ["-m", "qwen_vl_lora", "caption", "picture.jpg", "--params", f"base_model={base_path(family)},device=cpu"]
    said = output_of(["-W", "ignore", "-c", code], tmp_path)
    assert visible(said) == output_of(ours, project) != ""


def test_a_merge_that_lost_the_adapter_is_not_published(trained, run, project, monkeypatch):
    run("evaluation", **SETTINGS)
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(AdapterError, match=r"differ from those of base \+ adapter by"):
        run("export", **SETTINGS)
    assert not (project / "data/06_models/tiny/merged_model").exists()


def test_the_adapters_targets_are_a_plain_list_that_other_tools_read(trained, newest):
    config = json.loads((newest("06_models/tiny/adapter") / "adapter_config.json").read_text())
    expected = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(config["target_modules"]) == expected
