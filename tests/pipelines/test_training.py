"""The training pipeline makes an adapter that plain PEFT reads, and goes on where it was killed."""

import csv
import json
import re

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError, TrainingError
from qwen_vl_lora.training.loop import LOG_COLUMNS, TrainingLoop
from samples.pictures import jpeg, write


def weights(adapter):
    return load_file(adapter / "adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl"])
def test_training_leaves_an_adapter_a_log_a_summary_and_a_preview(run, newest, base):
    run("data_engineering")
    run("training", base=base, lora={"r": 3})
    adapter = newest("06_models/tiny/adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 3
    assert not any("visual" in name for name in weights(adapter))
    record = json.loads((adapter / "adapter_record.json").read_text())
    assert record["prompt"]["user"] == "Describe this picture."
    assert record["run"]["read"].keys() >= {"images", "train_conversations", "validation_conversations"}
    log = pd.read_csv(newest("08_reporting/tiny/training_log.csv"))
    assert tuple(log.columns) == LOG_COLUMNS
    assert (log["loss"].dropna() > 0).all()
    assert log["validation_loss"].notna().sum() == 1
    preview = json.loads(newest("08_reporting/tiny/batch_preview.json").read_text())
    assert "<|image_pad|>×16" in preview["rows"][0]["text"]
    assert preview["rows"][0]["scored"].endswith("<|im_end|>")
    summary = json.loads(newest("08_reporting/tiny/training_summary.json").read_text())
    assert summary["steps"] == -(-summary["samples"] // 4)


def test_a_run_that_holds_nothing_out_trains_on_all_of_it(run, newest):
    nothing = {"test_images": 0, "validation_images": 0}
    arguments = {"max_steps": 1, "eval_strategy": "no"}
    run("data_engineering", "training", split=nothing, training_args=arguments, captions={"num_rows": 12})
    summary = json.loads(newest("05_model_input/tiny/split_summary.json").read_text())
    assert summary["samples"] == {"train": 12, "validation": 0, "test": 0}
    assert json.loads(newest("08_reporting/tiny/training_summary.json").read_text())["samples"] == 12
    assert (newest("06_models/tiny/adapter") / "adapter_model.safetensors").is_file()


def test_plain_peft_gives_the_logits_of_the_adapter_directory(run, newest, base_path):
    run("data_engineering")
    run("training", lora={"r": 3})
    adapter = newest("06_models/tiny/adapter")
    base = AutoModelForImageTextToText.from_pretrained(base_path("qwen2_vl"))
    ids = torch.arange(20)[None]
    before = base(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, adapter)
    by_hand = {}
    for name, value in weights(adapter).items():
        module, side = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        by_hand.setdefault(module, {})[side[0]] = value
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        plain = AutoModelForImageTextToText.from_pretrained(base_path("qwen2_vl"))
        for module, sides in by_hand.items():
            plain.get_submodule(module).weight += sides["B"] @ sides["A"] * (16 / 3)
    assert torch.allclose(tuned, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned, before, rtol=1e-3, atol=1e-3)


def test_the_same_command_gives_the_same_bits_and_goes_on_after_a_kill(run, newest, monkeypatch, caplog):
    run("data_engineering")
    run("training")
    uninterrupted = weights(newest("06_models/tiny/adapter"))
    step = TrainingLoop.compute_gradients

    def die_at_the_fourth(self, *arguments):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "compute_gradients", die_at_the_fourth)
        run("training")
    with caplog.at_level("INFO"):
        run("training")
    assert "Resuming from" in caplog.text
    assert "checkpoint-2" in caplog.text
    assert same(weights(newest("06_models/tiny/adapter")), uninterrupted)
    run("training", resume="never")
    assert same(weights(newest("06_models/tiny/adapter")), uninterrupted)


def test_shared_and_separate_rows_train_the_same_number_of_steps(run, newest):
    run("data_engineering")
    steps = []
    for rows in ("shared", "separate"):
        run("training", rows=rows)
        summary = json.loads(newest("08_reporting/tiny/training_summary.json").read_text())
        steps.append((summary["steps"], summary["samples"], summary["epochs"]))
    assert steps[0] == steps[1]


def test_an_adapted_tower_trains_on_pixels(run, newest):
    run("data_engineering")
    run("training", base="qwen2_5_vl", vision="adapted", training_args={"max_steps": 1})
    assert any("visual" in name for name in weights(newest("06_models/tiny/adapter")))


def test_a_loss_that_is_no_number_stops_with_step_and_samples(run, monkeypatch):
    run("data_engineering")
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(TrainingLoop, "summed_loss", lambda self, forward: nan)
    with pytest.raises(TrainingError, match=r"loss became nan at step 1 on samples identity_\d+"):
        run("training")


def test_too_many_too_long_samples_stop_the_run(run):
    run("data_engineering")
    with pytest.raises(DataFormatError, match="longer than max_length 40"):
        run("training", max_length=40)


def test_too_long_samples_are_listed_with_their_row_of_the_source(run, project, newest):
    for seed in range(14):
        write(project / "mine" / f"{seed}.jpg", jpeg(seed))
    captions = {seed: f"Picture {seed}." for seed in range(14)} | {1: "", 5: "star " * 200, 9: "star " * 300}
    lines = [f"{seed}.jpg,{caption}" for seed, caption in captions.items()]
    write(project / "mine" / "captions.csv", "\n".join(["image_path,caption", *lines]).encode())
    own = {"env": "own_captions", "captions_file": "mine/captions.csv", "quarantine": {"max_share": 0.5}}
    split = {"test_images": 1, "validation_images": 2}
    run("data_engineering", "training", split=split, training_args={"max_steps": 1}, max_length=150, **own)
    with newest("02_intermediate/own_captions/rejected_samples.csv").open(newline="") as lines:
        assert [(bad["row"], bad["reason"]) for bad in csv.DictReader(lines)] == [("2", "empty_caption")]
    with newest("08_reporting/own_captions/left_out_samples.csv").open(newline="") as lines:
        left_out = list(csv.DictReader(lines))
    assert {(bad["row"], bad["image_id"], bad["reason"]) for bad in left_out} == {
        ("6", "5.jpg", "longer_than_max_length"),
        ("10", "9.jpg", "longer_than_max_length"),
    }
    assert re.fullmatch(
        r"identity_6 has \d{3} tokens, \d+ of them its pictures'; max_length allows 150\..*", left_out[0]["detail"]
    )
    summary = json.loads(newest("08_reporting/own_captions/training_summary.json").read_text())
    assert summary["left_out_too_long"] + summary["samples"] == 10


def test_pictures_that_do_not_reach_the_model_stop_the_run(run, monkeypatch):
    from qwen_vl_lora.features.inputs import StoredPictures

    blind = StoredPictures.__call__

    def all_zero(self, names):
        inputs = blind(self, names)
        inputs["mm_encoder_outputs"]["image"].pooler_output = tuple(
            part * 0 for part in inputs["mm_encoder_outputs"]["image"].pooler_output
        )
        return inputs

    run("data_engineering")
    monkeypatch.setattr(StoredPictures, "__call__", all_zero)
    with pytest.raises(TrainingError, match="do not reach"):
        run("training")


def test_an_automatic_batch_size_changes_the_cut_and_not_the_result(run, newest):
    run("data_engineering")
    no_dropout = {"lora": {"lora_dropout": 0.0}}
    by_two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    run("training", training_args=by_two, **no_dropout)
    by_hand = weights(newest("06_models/tiny/adapter"))
    at_once = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 12}
    run("training", training_args=at_once, **no_dropout)
    automatic = weights(newest("06_models/tiny/adapter"))
    for name, value in by_hand.items():
        assert torch.allclose(automatic[name], value, rtol=1e-3, atol=1e-4), name


def test_checkpointed_activations_give_the_same_adapter(run, newest):
    run("data_engineering")
    run("training", training_args={"max_steps": 3})
    plain = weights(newest("06_models/tiny/adapter"))
    run("training", training_args={"max_steps": 3, "gradient_checkpointing": True})
    checkpointed = weights(newest("06_models/tiny/adapter"))
    for name, value in plain.items():
        assert torch.allclose(checkpointed[name], value, rtol=1e-4, atol=1e-6), name


def test_a_lost_picture_stops_the_run_before_any_node(run, project, caplog):
    run("data_engineering")
    lost = next((project / "data/02_intermediate/tiny/images/files").iterdir())
    lost.unlink()
    with caplog.at_level("INFO"), pytest.raises(MissingArtifactError, match=f"Dataset images: 1 pictures.*{lost.name}"):
        run("training")
    assert "encode_images" not in caplog.text
