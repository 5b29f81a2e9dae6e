"""What stands before the first node: the cheapest check first, the network last."""

import pytest
import torch

from qwen_vl_lora.exceptions import DeviceError, MissingArtifactError, ParameterError
from qwen_vl_lora.hub import snapshots, tables
from qwen_vl_lora.session import preflight, sound_settings

TWO_BILLION = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Repositories that a hub was asked for, none of which it gives."""
    seen = []

    def refuse(repository, remedy):
        seen.append(repository.id)
        raise MissingArtifactError(f"the hub was asked for {repository.id}")

    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "no hub"))
    monkeypatch.setattr(snapshots, "require_reachable", refuse)
    monkeypatch.setattr(tables, "require_reachable", refuse)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_a_recipe_for_one_names_it_first(fresh_run, asked):
    for pipelines in (["training"], ["data_engineering", "training"]):
        with pytest.raises(DeviceError, match="torch sees no CUDA device here"):
            fresh_run(*pipelines, env="qwen2_vl_2b_coco", base_model=TWO_BILLION, device="cuda")
    assert asked == []


@pytest.fixture
def any_settings(monkeypatch):
    """The tiny base's settings may train a large one here: whether they should is another check."""
    monkeypatch.setattr(sound_settings, "check_settings", lambda *_: None)


@pytest.mark.usefixtures("any_settings")
def test_what_is_not_here_is_named_before_a_hub_is_asked(fresh_run, asked):
    with pytest.raises(MissingArtifactError, match="Dataset images: .* not found"):
        fresh_run("training", base_model=TWO_BILLION)
    assert asked == []


@pytest.mark.usefixtures("any_settings")
def test_a_training_that_no_gpu_of_this_size_holds_is_refused_before_a_hub_is_asked(run, asked, monkeypatch):
    run("data_engineering")
    monkeypatch.setattr(preflight, "memory_of", lambda device: 6 * 2**30)
    remedies = "needs an estimated .* GiB of GPU memory; this GPU has 6.0 GiB.*\n.*training_args.bf16: true"
    with pytest.raises(DeviceError, match=remedies):
        run("training", base_model=TWO_BILLION)
    with pytest.raises(DeviceError, match="this GPU has 6.0 GiB.*quantization: nf4, a smaller base"):
        run("data_engineering", "training", base_model=TWO_BILLION)
    assert asked == []
    monkeypatch.setattr(preflight, "memory_of", lambda device: 80 * 2**30)
    with pytest.raises(MissingArtifactError, match=f"asked for {TWO_BILLION}"):
        run("training", base_model=TWO_BILLION)


@pytest.mark.parametrize("pipelines", [("data_engineering",), ("data_engineering", "training", "evaluation")])
def test_pixel_limits_that_hold_no_image_token_stop_every_run_before_its_first_node(fresh_run, caplog, pipelines):
    sizes = {"resized_height": None, "resized_width": None, "min_pixels": 50, "max_pixels": 100}
    message = "max_pixels: expected at least 784, one image token of 28 x 28 px; got 100"
    with caplog.at_level("INFO"), pytest.raises(ParameterError, match=message):
        fresh_run(*pipelines, image=sizes)
    assert "collect_samples" not in caplog.text


def test_what_only_transformers_can_judge_stops_a_training_and_no_preparation_of_data(run, caplog):
    wrong = {"lr_scheduler_type": "warmup_stable_decay"}
    run("data_engineering", training_args=wrong)
    with caplog.at_level("INFO"), pytest.raises(ParameterError, match="num_decay_steps"):
        run("training", training_args=wrong)
    assert "encode_images" not in caplog.text


def test_captions_that_would_share_a_row_of_recurrent_layers_stop_the_training_before_its_first_node(run, caplog):
    run("data_engineering")
    with caplog.at_level("INFO"), pytest.raises(ParameterError, match=r"rows: `shared`.*Qwen3\.5.*rows: separate"):
        run("training", base="qwen3_5", rows="shared")
    assert "encode_images" not in caplog.text


def test_flex_attention_on_a_processor_stops_the_training_before_its_first_node(run, caplog):
    run("data_engineering")
    with caplog.at_level("INFO"), pytest.raises(DeviceError, match=r"gradients on GPUs only.*Set attention: sdpa"):
        run("training", attention="flex_attention")
    assert "encode_images" not in caplog.text


@pytest.mark.parametrize(("family", "said"), [("qwen2_vl", 0), ("qwen3_vl", 1)])
def test_a_size_that_image_tokens_do_not_fill_is_said_once(run, caplog, family, said):
    run("data_engineering")
    with caplog.at_level("INFO"):
        run("training", base=family)
    assert caplog.text.count("pictures become 128 x 128 px, whole image tokens of 32 x 32 px") == said
