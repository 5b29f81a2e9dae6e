"""The README of an adapter's directory, as Hugging Face reads it."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.model_card import CARD_FILE, adapter_card, base_hub_id, note_metrics, write_adapter_card
from qwen_vl_lora.model.shipped_base import FINGERPRINT
from qwen_vl_lora.pages.language import ENGLISH, choose_language
from qwen_vl_lora.runs.artifacts import describe_artifact
from tiny_adapters import adapter_record, write_record

SCORES = {"CIDEr": 1.0}
METRICS = {
    "num_images": 64,
    "tokenizer": "ptb",
    "base": SCORES,
    "tuned": {"CIDEr": 9.0},
    "delta": {"CIDEr": 8.0},
    "exact_match": {"base": 0.0, "tuned": 0.5},
    "confidence": {"base": {"CIDEr": [0.9, 1.1]}, "tuned": {"CIDEr": [8.5, 9.5]}, "delta": {"CIDEr": [7.5, 8.5]}},
}


def base(name, revision=None):
    return {"name": name, "revision": revision, "fingerprint": "ab" * 32, "files": {}}


@pytest.fixture
def directory(tmp_path):
    write_record(tmp_path, adapter_record(base_model=base("Qwen/Qwen2-VL-2B-Instruct", "895c3a4")))
    return tmp_path


@pytest.fixture
def published(base_path, tmp_path_factory):
    """A base whose README states a licence."""
    folder = shutil.copytree(base_path("qwen2_vl"), tmp_path_factory.mktemp("published") / "base")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return BaseModel("published", folder)


@pytest.mark.parametrize(
    ("recorded", "hub_id"),
    [
        (base("Qwen/Qwen2-VL-2B-Instruct", "895c3a4"), "Qwen/Qwen2-VL-2B-Instruct"),
        (base("/models/Qwen2-VL-2B-Instruct"), "Qwen/Qwen2-VL-2B-Instruct"),
        (base("data/06_models/tiny_qwen2_vl"), None),
        (base("a/b\nlicense: mit", "main"), None),
        (base("hf:owner/name", "main"), "owner/name"),
    ],
)
def test_a_base_is_named_by_its_hub_id(recorded, hub_id):
    assert base_hub_id(recorded) == hub_id
    head = yaml.safe_load(adapter_card(adapter_record(base_model=recorded), None).split("---")[1])
    assert head.get("base_model") == hub_id
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "image-text-to-text")
    assert "license" not in head


def test_a_small_base_that_saw_photographs_is_named_as_such():
    run = {"read": {"captioned_images": {"type": "CaptionsFile"}}}
    record = adapter_record(base_model={**base("tiny"), "fingerprint": FINGERPRINT}) | {"run": run}
    assert ENGLISH("drawings_only") in adapter_card(record, None)
    assert ENGLISH("drawings_only") not in adapter_card(adapter_record(base_model=base("tiny")), None)


def test_the_card_says_how_the_adapter_is_used_and_what_it_was_trained_on(directory, published):
    write_adapter_card(directory, published)
    card = (directory / CARD_FILE).read_text(encoding="utf-8")
    assert "license: apache-2.0\n" in card
    assert 'PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), "path/to/this/folder")' in card
    assert "base = 'Qwen/Qwen2-VL-2B-Instruct'" in card
    assert "do_sample=False, max_new_tokens=7, repetition_penalty=1.0" in card
    assert "Not evaluated: `kedro run --pipeline evaluation`." in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == [f"## {name}" for name in ("Use", "Metrics", "Training data", "Settings", "Limits", "Licences")]


def test_metrics_come_in_with_their_intervals_and_leave_the_rest(directory, published):
    write_adapter_card(directory, published)
    file = directory / CARD_FILE
    file.write_text(file.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    before = file.read_text(encoding="utf-8")
    note_metrics(directory, METRICS)
    card = file.read_text(encoding="utf-8")
    assert "| CIDEr | 1.000 (0.900 to 1.100) | 9.000 (8.500 to 9.500) | +8.000 (+7.500 to +8.500) |" in card
    assert "| exact match | 0% | 50% | +50 percentage points |" in card
    assert "Not evaluated" not in card
    assert card.partition("## Training data")[2] == before.partition("## Training data")[2]
    note_metrics(directory, {**METRICS, "num_images": 65})
    assert file.read_text(encoding="utf-8").count("| CIDEr |") == 1


def test_a_card_in_chinese_stays_in_chinese(directory, published):
    write_adapter_card(directory, published, choose_language("auto", ["一只狗"]))
    write_adapter_card(directory)  # as the run notes itself in the record
    file = directory / CARD_FILE
    assert "尚未评估：`kedro run --pipeline evaluation`。" in file.read_text(encoding="utf-8")
    note_metrics(directory, METRICS)
    card = file.read_text(encoding="utf-8")
    assert "| CIDEr | 1.000（0.900 至 1.100） | 9.000（8.500 至 9.500） | +8.000（+7.500 至 +8.500） |" in card
    assert "license: apache-2.0\n" in card
    headings = [line for line in card.splitlines() if line.startswith("#") and not line.isascii()]
    assert headings[1:] == [f"## {name}" for name in ("使用方法", "指标", "训练数据", "设置", "局限", "许可")]
    prose = re.sub(r"```.*?```|`[^`]*`|^---.*?^---", "", card, flags=re.DOTALL | re.MULTILINE)
    known = {"Qwen", "VL", "Instruct", "LoRA", "lora", "alpha", "frozen", "CIDEr", "ptb", "sha", "qwen", "vl", "Apache"}
    assert set(re.findall("[A-Za-z]{2,}", prose)) <= known


def test_a_readme_of_somebody_else_is_left_alone(directory):
    note_metrics(directory, METRICS)
    assert not (directory / CARD_FILE).exists()
    (directory / CARD_FILE).write_text("## Metrics\n\nMine.\n\n## More\n", encoding="utf-8")
    note_metrics(directory, METRICS)
    assert (directory / CARD_FILE).read_text(encoding="utf-8") == "## Metrics\n\nMine.\n\n## More\n"


def test_the_card_is_no_part_of_the_artifact(directory, published):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (directory / name).write_text("{}")
    without = describe_artifact("adapter", directory, directory, None)
    write_adapter_card(directory, published)
    assert describe_artifact("adapter", directory, directory, None) == without
