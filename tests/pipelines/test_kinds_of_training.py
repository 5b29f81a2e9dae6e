"""QLoRA, DoRA, rsLoRA and going on from an adapter: each trains, is measured, captions and is exported."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError, ParameterError
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.training.loop import TrainingLoop

ADAPTER = "06_models/tiny/adapter"
STRONG = {"lora": {"lora_dropout": 0.0}, "training_args": {"learning_rate": 0.05}}
"""A random base needs a large step before an adapter changes more than a merge rounds away."""


def weights(adapter):
    return load_file(adapter / "adapter_model.safetensors")


def record(adapter):
    return json.loads((adapter / "adapter_record.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantized_base_trains_is_measured_captions_and_is_exported(run, newest, project, quantization):
    pytest.importorskip("bitsandbytes")
    run("data_engineering")
    run("training", "evaluation", quantization=quantization, report={"language": "zh"}, **STRONG)
    adapter = newest(ADAPTER)
    assert "张留出图片" in (adapter / "README.md").read_text(encoding="utf-8")
    assert record(adapter)["quantization"] == quantization
    losses = pd.read_csv(newest("08_reporting/tiny/training_log.csv"))["loss"].dropna().tolist()
    assert losses[-1] < losses[0]
    pictures = project / "data/02_intermediate/tiny/images/files"
    run("inference", quantization=quantization, inference={"images": str(next(pictures.iterdir()))})
    assert len(pd.read_csv(newest("07_model_output/tiny/captions.csv"))) == 1
    run("export")
    card = (newest("06_models/tiny/merged_model") / "README.md").read_text(encoding="utf-8")
    assert f"trained on {quantization} weights and merged into the full ones" in card
    with pytest.raises(AdapterError, match=f"quantization: trained with {quantization}, configured None"):
        run("evaluation")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("use_dora", True),
        pytest.param("use_rslora", True, marks=pytest.mark.slow),
        pytest.param("modules_to_save", ["lm_head", "language_model.norm"], marks=pytest.mark.slow),
        pytest.param("target_modules", ["q_proj", "lm_head", "embed_tokens"], marks=pytest.mark.slow),
        pytest.param("init_lora_weights", "olora", marks=pytest.mark.slow),
    ],
)
def test_other_kinds_of_lora_train_resume_and_are_exported(run, newest, monkeypatch, kind, value):
    changes = {**STRONG, "lora": {"lora_dropout": 0.0, "r": 8, kind: value}}
    run("data_engineering")
    run("training", "evaluation", **changes)
    whole = weights(newest(ADAPTER))
    assert any("lora_magnitude_vector" in name for name in whole) is (kind == "use_dora")
    step = TrainingLoop.compute_gradients

    def die_at_the_fourth(self, *arguments):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "compute_gradients", die_at_the_fourth)
        run("training", **changes)
    run("training", **changes)
    assert json.loads(newest("08_reporting/tiny/training_summary.json").read_text())["resumed_from"] == "checkpoint-2"
    resumed = weights(newest(ADAPTER))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    run("evaluation", "export", **changes)
    assert (newest("06_models/tiny/merged_model") / "model.safetensors").is_file()


@pytest.mark.slow
def test_whole_modules_train_in_half_precision_with_checkpointing_and_are_exported(run, newest):
    changes = {
        "lora": {"lora_dropout": 0.0, "modules_to_save": ["lm_head", "input_layernorm"]},
        "training_args": {"learning_rate": 0.01, "bf16": True, "gradient_checkpointing": True},
    }
    run("data_engineering")
    run("training", "evaluation", "export", **changes)
    assert {value.dtype for value in weights(newest(ADAPTER)).values()} == {torch.float32}
    config = json.loads((newest("06_models/tiny/merged_model") / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_module_that_the_base_lacks_stops_before_any_node(run, caplog):
    run("data_engineering")
    with caplog.at_level("INFO"), pytest.raises(ParameterError, match="target_modules: 'v_prj' matches no module"):
        run("training", lora={"target_modules": ["q_proj", "v_prj"]})
    assert "encode_images" not in caplog.text


def test_training_goes_on_from_an_adapter_and_its_record_names_the_parent(run, newest, project):
    run("data_engineering")
    run("training")
    parent = newest(ADAPTER)
    version = parent.parent.name
    still = {"training_args": {"learning_rate": 1e-30, "max_steps": 1}}
    run("training", init_adapter=version, **still)
    child = newest(ADAPTER)
    assert child != parent
    place = parent.relative_to(project).as_posix()
    named = {"path": place, "sha256": file_sha256(parent / "adapter_model.safetensors")}
    assert record(child)["parent"] == {**named, "run": record(parent)["run"]["id"]}
    assert record(parent)["parent"] is None
    for name, value in weights(parent).items():
        assert torch.equal(weights(child)[name], value), name
    (job,) = (
        inputs
        for file in (project / "data/09_workspace/tiny/training").glob("*/inputs.json")
        if (inputs := json.loads(file.read_text()))["init_adapter"] is not None
    )
    assert job["init_adapter"] == named["sha256"]
    run("training", init_adapter=str(parent), lora={"lora_dropout": 0.3}, **still)
    assert record(newest(ADAPTER))["parent"] == record(child)["parent"]


def test_an_adapter_of_another_shape_or_base_is_refused_with_every_difference(run, newest, base_path):
    run("data_engineering")
    run("training", training_args={"max_steps": 1})
    version = newest(ADAPTER).parent.name
    with pytest.raises(
        AdapterError, match=r"cannot continue from.*lora.r: 64 in the adapter, 8 here; lora.use_rslora: False in"
    ):
        run("training", init_adapter=version, lora={"r": 8, "use_rslora": True})
    with pytest.raises(AdapterError, match=r"base model: \w{64} in the adapter, \w{64} here"):
        run("training", init_adapter=version, base_model=str(base_path("qwen2_5_vl")))


def test_an_adapter_that_is_not_there_stops_before_any_node(run, caplog):
    run("data_engineering")
    with (
        caplog.at_level("INFO"),
        pytest.raises(MissingArtifactError, match=r"'2020', which is neither .*versions found: none"),
    ):
        run("training", init_adapter="2020")
    assert "encode_images" not in caplog.text


def test_a_parent_with_other_tensors_is_refused(run, newest, tmp_path):
    run("data_engineering")
    run("training", training_args={"max_steps": 1})
    file = newest(ADAPTER) / "adapter_model.safetensors"
    kept = load_file(file)
    kept.pop(next(iter(kept)))
    save_file(kept, file)
    with pytest.raises(AdapterError, match=r"1 tensors differ, the first is .*None in the adapter"):
        run("training", init_adapter=newest(ADAPTER).parent.name)


@pytest.mark.parametrize("lora", [{"bias": "lora_only"}, {"init_lora_weights": "pissa", "r": 8}])
def test_base_captions_are_the_bases_own_whatever_an_adapter_leaves_behind(run, newest, lora):
    run("data_engineering")
    run("training", "evaluation")
    plain = pd.read_csv(newest("07_model_output/tiny/predictions.csv"))
    run("training", "evaluation", **{**STRONG, "lora": {**STRONG["lora"], **lora}})
    predictions = pd.read_csv(newest("07_model_output/tiny/predictions.csv"))
    assert predictions["base_caption"].tolist() == plain["base_caption"].tolist()
    assert predictions["tuned_caption"].tolist() != plain["base_caption"].tolist()


def test_a_parent_that_took_its_start_out_of_the_base_is_gone_on_from_in_the_same_way_only(run, newest):
    run("data_engineering")
    lora = {"init_lora_weights": "pissa", "r": 8}
    run("training", training_args={"max_steps": 1}, lora=lora)
    version = newest(ADAPTER).parent.name
    with pytest.raises(AdapterError, match=r"lora.init_lora_weights: pissa in the adapter, None here"):
        run("training", init_adapter=version, lora={"r": 8})
    run("training", init_adapter=version, lora=lora)
    run("training", training_args={"max_steps": 1}, lora={"init_lora_weights": "gaussian"})
    run("training", init_adapter=newest(ADAPTER).parent.name)
