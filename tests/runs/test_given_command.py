"""Messages repeat the command that was given, with what it lacks."""

import pytest

from qwen_vl_lora.datasets.sources import require_path
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError
from qwen_vl_lora.runs.given_command import repeated
from qwen_vl_lora.samples.named_pictures import named_place

LACKING = {"captions_file": "path/to/captions.csv"}
MORE = "captions_file=path/to/captions.csv"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["/bin/qwen-vl-lora", "plan", "--env", "a"], f"qwen-vl-lora plan --env a --params {MORE}"),
        (["/bin/kedro", "run", "--params=x=1", "-e", "a"], f"kedro run -e a --params x=1,{MORE}"),
        (["/lib/kedro/__main__.py", "run", "--params", "x=1"], f"python -m kedro run --params x=1,{MORE}"),
        (
            ["/lib/qwen_vl_lora/__main__.py", "--conf-source=c"],
            f"python -m qwen_vl_lora --conf-source=c --params {MORE}",
        ),
        (["kedro", "run", "--params", f"x=1, {MORE}"], f"kedro run --params 'x=1, {MORE}'"),
        (["/lib/ipykernel_launcher.py", "-f", "kernel.json"], f"--params {MORE}"),
        (["kedro", "run", "--params", "prompt.user=two words"], f"kedro run --params 'prompt.user=two words,{MORE}'"),
    ],
)
def test_the_given_command_is_repeated_with_more_parameters(monkeypatch, given, said):
    monkeypatch.setattr("sys.argv", given)
    assert repeated(LACKING) == said


def test_an_environment_takes_the_place_of_the_given_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["qwen-vl-lora", "plan", "-e", "a", "--gpu-memory", "24GB", "--env=b"])
    assert repeated({"x": "1"}, env="c") == "qwen-vl-lora plan --gpu-memory 24GB --env c --params x=1"


def test_a_secret_of_the_command_line_is_not_repeated(monkeypatch):
    monkeypatch.setattr("sys.argv", ["kedro", "run", "--params", "training_args.hub_token=abcdefgh"])
    assert "abcdefgh" not in repeated({"x": "1"})


def test_a_plan_without_captions_is_told_to_plan_with_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["qwen-vl-lora", "plan", "--env", "qwen2_5_vl_7b"])
    with pytest.raises(
        MissingArtifactError, match="has no file.*: qwen-vl-lora plan --env qwen2_5_vl_7b --params capt"
    ):
        require_path(None, "a table")


def test_an_inference_without_pictures_is_told_to_repeat_with_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["kedro", "run", "--pipeline", "inference", "--env", "own_captions"])
    with pytest.raises(
        ParameterError, match="kedro run --pipeline inference --env own_captions --params inference.imag"
    ):
        named_place(None)
