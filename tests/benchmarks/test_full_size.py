"""The full-size run, carried out at toy size: checkpoint, overfitting, and the recipe as a person starts it."""

import json
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("env", ["qwen2_vl_2b_coco", "qwen2_5_vl_7b"])
def test_a_recipe_runs_as_a_whole_on_random_weights(tmp_path, monkeypatch, env):
    monkeypatch.syspath_prepend(str(PROJECT))
    from benchmarks import full_size

    options = ["--env", env, "--geometry", "toy", "--device", "cpu", "--dtype", "float32", "--rows", "24"]
    assert full_size.main([*options, "--out", str(tmp_path)]) == 0

    (file,) = tmp_path.glob("*-toy.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["overfit"]["last_loss"] <= results["overfit"]["first_loss"] / 2
    assert results["recipe"]["as_planned"]
    assert results["recipe"]["training"]["samples"] == 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_parts_of_make_verify_full_size_run_on_a_narrow_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PROJECT))
    from benchmarks import verify_full_size

    assert verify_full_size.main(["--toy", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*-full-size-toy.json")
    parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
    assert parts["build"]["vocabulary"] == 151_657
    assert parts["plan"]["tokens_are_estimated"] is False
    assert parts["training, resumed"]["resumed_from"] == "checkpoint-1"
    assert parts["training, not interrupted"]["weights_are_equal"]
    assert parts["plain transformers"]["wrote_characters"] > 0
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name, part in parts.items() if "estimated_mib" in part)


@pytest.mark.parametrize(
    ("geometry", "name"), [("2b", "Qwen/Qwen2-VL-2B-Instruct"), ("7b", "Qwen/Qwen2.5-VL-7B-Instruct")]
)
def test_the_checkpoints_that_are_built_have_the_published_sizes(monkeypatch, processor, geometry, name):
    import torch

    from qwen_vl_lora.model.families import family_of_published

    monkeypatch.syspath_prepend(str(PROJECT))
    from benchmarks import replica

    model_class, config = replica._architecture(replica.GEOMETRIES[geometry], processor.tokenizer)
    with torch.device("meta"):
        model = model_class(config)
    family = family_of_published(name)
    published = family.published_geometry(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters
    assert family.geometry(config.to_dict()) == published
