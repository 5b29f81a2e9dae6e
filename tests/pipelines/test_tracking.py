"""One run of pipelines is one SwanLab run, told of training and evaluation, and closed however the run ends."""

import json

import pandas as pd
import pytest

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.tracking.tracker import current_tracker
from qwen_vl_lora.training.loop import TrainingLoop
from tracking.cloud import KEY, Cloud
from tracking.mlflow_server import MLflowServer
from tracking.test_mlflow import needs_mlflow
from tracking.test_tensorboard import needs_tensorboard, read


@pytest.fixture
def cloud(monkeypatch):
    cloud = Cloud()
    monkeypatch.setenv("SWANLAB_API_HOST", cloud.address)
    monkeypatch.setenv("SWANLAB_API_KEY", KEY)
    yield cloud
    cloud.close()


@pytest.fixture
def run(run):
    """Pipelines that tell SwanLab of themselves."""

    def go(*pipelines, swanlab=None, **changes):
        return run(*pipelines, swanlab={"mode": "auto", **(swanlab or {})}, **changes)

    return go


def logged(newest, column):
    log = pd.read_csv(newest("08_reporting/tiny/training_log.csv")).dropna(subset=[column])
    return dict(zip(log["step"], log[column], strict=True))


def test_training_and_evaluation_of_one_run_are_one_swanlab_run(run, newest, cloud):
    run("data_engineering")
    assert not cloud.received
    run("training", "evaluation", swanlab={"prediction_images": 3})
    shown = cloud.run
    for column, curve in {
        "loss": "train/loss",
        "validation_loss": "validation/loss",
        "grad_norm": "train/grad_norm",
    }.items():
        assert shown.curve(curve) == pytest.approx(logged(newest, column))
    metrics = json.loads(newest("08_reporting/tiny/caption_metrics.json").read_text())
    last = max(logged(newest, "epoch"))
    assert shown.curve("evaluation/tuned/CIDEr") == pytest.approx({last: metrics["tuned"]["CIDEr"]})
    predictions = pd.read_csv(newest("07_model_output/tiny/predictions.csv"), dtype=str, keep_default_na=False)
    assert [text.partition("\nreference")[0] for text in shown.pictures["Prediction"]] == [
        f"tuned: {row.tuned_caption}\nbase: {row.base_caption}" for row in predictions.head(3).itertuples()
    ]
    record = json.loads((newest("06_models/tiny/adapter") / "adapter_record.json").read_text())
    read = record["run"]["read"]
    assert shown.config["run"] == record["run"]["id"]
    assert shown.config["data.train_conversations"] == read["train_conversations"]["version"]
    assert shown.config["data.adapter"] == record["run"]["id"]
    assert shown.config["base_model.fingerprint"] == record["base_model"]["fingerprint"]
    assert shown.config["parameters.lora.target_modules"] == record["lora"]["target_modules"]
    assert shown.config["parameters.training_args.learning_rate"] == record["training_args"]["learning_rate"]
    assert shown.state == "FINISHED"


@needs_mlflow
@needs_tensorboard
@pytest.mark.slow
def test_one_run_is_in_all_trackers_under_its_id_and_mlflow_has_its_adapter(
    run, newest, project, cloud, tmp_path_factory
):
    run("data_engineering")
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        every = ["swanlab", "mlflow", "tensorboard"]
        run("training", "evaluation", trackers=every, mlflow={"tracking_uri": server.address})
        (shown,) = server.runs("qwen-vl-lora")
        record = json.loads((newest("06_models/tiny/adapter") / "adapter_record.json").read_text())
        assert shown["info"]["run_name"] == record["run"]["id"]
        weights = newest("06_models/tiny/adapter") / "adapter_model.safetensors"
        assert server.read(shown, "adapter/adapter_model.safetensors") == weights.read_bytes()
        seen = read(project / "logs" / "tensorboard" / "tiny" / record["run"]["id"])
        for column, curve in {"loss": "train/loss", "validation_loss": "validation/loss"}.items():
            expected = list(logged(newest, column).items())
            assert server.curve(shown, curve) == [(step, pytest.approx(value)) for step, value in expected]
            points = [(point.step, point.value) for point in seen.Scalars(curve)]
            assert points == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
            assert cloud.run.curve(curve) == pytest.approx(dict(expected))
    finally:
        server.close()


def test_a_training_that_goes_on_goes_on_in_its_swanlab_run(run, newest, cloud, monkeypatch):
    run("data_engineering")
    step = TrainingLoop.compute_gradients

    def die_at_the_fourth(self, *arguments):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    named = {"training_args": {"logging_steps": 1}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "compute_gradients", die_at_the_fourth)
        run("training", **named)
    assert current_tracker() is not None  # Kedro tells hooks nothing of a Ctrl-C
    run("training", **named)
    assert current_tracker() is None
    assert cloud.run.times_opened == 2
    assert cloud.run.curve("train/loss") == pytest.approx(logged(newest, "loss"))
    assert cloud.run.state == "FINISHED"


def test_a_run_that_fails_is_marked_with_its_message(run, cloud, monkeypatch):
    run("data_engineering")
    step = TrainingLoop.compute_gradients

    def fail_at_the_third(self, *arguments):
        if self.state.step == 2:
            raise TrainingError("the loss became a melon")
        return step(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "compute_gradients", fail_at_the_third)
    with pytest.raises(TrainingError, match="melon"):
        run("training")
    assert cloud.run.state == "CRASHED"
    assert cloud.run.logs == ["TrainingError: the loss became a melon"]


def test_a_lost_picture_costs_the_chart_and_not_the_run(run, project, newest, monkeypatch, caplog):
    from qwen_vl_lora.session import hooks

    run("data_engineering")

    def lose(*arguments):
        raise FileNotFoundError("a picture")

    monkeypatch.setattr(hooks, "_predicted_pictures", lose)
    run("training", "evaluation")
    assert "SwanLab stopped recording this run (FileNotFoundError: a picture); the run continues." in caplog.text
    assert newest("08_reporting/tiny/comparison_report.html").is_file()


def test_pipelines_without_curves_start_no_swanlab(run, project):
    run("data_engineering", swanlab={"mode": "local"})
    assert not (project / "logs" / "swanlab").exists()
