"""The evaluation pipeline compares base and tuned with everything else equal."""

import json

import pandas as pd
import pytest

from qwen_vl_lora.exceptions import AdapterError, ParameterError


@pytest.fixture
def trained(run, once):
    """The default data and an adapter of them."""

    def make():
        run("data_engineering")
        run("training")

    once("trained", make)


def test_evaluation_leaves_predictions_metrics_and_one_self_contained_page(trained, run, newest):
    run("evaluation")
    predictions = pd.read_csv(newest("07_model_output/tiny/predictions.csv"), keep_default_na=False)
    assert list(predictions.columns) == [
        "image_id", "image_path", "prompt", "references", "base_caption", "tuned_caption", "base_cut",
        "tuned_cut",
    ]  # fmt: skip
    assert len(predictions) == 6
    assert set(predictions["base_cut"]) | set(predictions["tuned_cut"]) <= {True, False}
    assert all(json.loads(references) for references in predictions["references"])
    metrics = json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    assert metrics["num_images"] == 6
    assert metrics["cut_captions"]["base"] == predictions["base_cut"].sum() > 0  # of 4 new tokens
    assert metrics["base"].keys() == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"}
    page = newest("08_reporting/tiny/comparison_report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 6
    assert 'src="http' not in page
    assert 'aria-label="Loss over ' in page
    card = (newest("06_models/tiny/adapter") / "README.md").read_text(encoding="utf-8")
    assert f"6 held-out pictures, tokenizer {metrics['tokenizer']}" in card


def test_the_page_and_the_terminal_are_in_the_language_of_the_parameters(trained, run, newest, capsys):
    run("evaluation", report={"language": "zh"})
    page = newest("08_reporting/tiny/comparison_report.html").read_text(encoding="utf-8")
    assert '<html lang="zh-CN">' in page
    assert "<dt>可训练参数</dt>" in page
    said = capsys.readouterr().out
    assert "6 张留出图片" in said
    assert "下一步：打开页面" in said
    card = (newest("06_models/tiny/adapter") / "README.md").read_text(encoding="utf-8")
    assert "held-out pictures" in card  # a card keeps the language that it was written in


def test_another_prompt_than_that_of_the_data_is_refused(trained, run):
    with pytest.raises(ParameterError, match=r"prompt.user: Describe this picture. → What is this\?"):
        run("evaluation", prompt={"user": "What is this?"})


def test_conversations_that_ask_otherwise_than_is_configured_are_not_trained_on(run):
    run("data_engineering")
    with pytest.raises(ParameterError, match=r"other parameters than those of this run .*\n  prompt.user: Describe"):
        run("training", prompt={"user": "What is this?"})
    with pytest.raises(ParameterError, match="prompt.system: None → Be brief"):
        run("training", "evaluation", prompt={"system": "Be brief."})


def test_an_adapter_is_not_evaluated_on_conversations_that_ask_otherwise(trained, run):
    told = {"scoring": {"settings_from": "adapter"}}
    with pytest.raises(ParameterError, match=r"than the adapter was trained with: prompt.user: What is this\? → Desc"):
        run("data_engineering", "evaluation", prompt={"user": "What is this?"}, **told)
    run("data_engineering", prompt={"user": "What is this?"})
    run("evaluation", **told)  # of the data that the adapter was trained on


def test_an_adapter_of_another_base_is_refused(trained, run):
    with pytest.raises(AdapterError, match="base model: trained with"):
        run("evaluation", base="qwen2_5_vl")


def test_told_to_an_adapter_is_evaluated_by_its_own_settings(trained, run, newest):
    run("evaluation")
    own = newest("07_model_output/tiny/predictions.csv").read_text()
    other = {"image": {"resized_height": 56, "resized_width": 84}}
    with pytest.raises(
        AdapterError, match=r"image: trained with .*112.*configured .*84.*scoring.settings_from=adapter"
    ):
        run("evaluation", **other)
    run("evaluation", scoring={"settings_from": "adapter"}, prompt={"user": "What is this?"}, **other)
    assert newest("07_model_output/tiny/predictions.csv").read_text() == own


def test_an_adapter_that_reaches_the_tower_is_not_shown_features_of_the_bare_tower(run):
    run("data_engineering")
    run("training", vision="adapted", training_args={"max_steps": 1})
    with pytest.raises(AdapterError, match="vision: trained with adapted, configured frozen"):
        run("evaluation")
    run("evaluation", scoring={"settings_from": "adapter"})
