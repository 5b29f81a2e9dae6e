"""A run is one folder of event files that TensorBoard itself reads, with each value once."""

import importlib.util
from types import SimpleNamespace

import pytest

from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import TensorBoardParameters
from qwen_vl_lora.tracking import tracker as tracking
from qwen_vl_lora.tracking.tensorboard import TensorBoardTracker
from tracking.runs import METRICS, losses, pictures, train

RUN = "2026-01-02T03.04.05.678Z"
SECRET = "ghp_abcdefghijklmnopqrstuvwx0123"

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="requirements-dev.txt has tensorboard"
)


@pytest.fixture
def make_tracker(monkeypatch, tmp_path):
    """`make_tracker(run)`: a run that TensorBoard alone is told of."""
    made = []

    def make(run):
        def describe():
            lora = {"r": 8, "target_modules": ["q_proj", "v_proj"]}
            return {"run": run, "parameters": {"lora": lora, "prompt": {"user": "x" * 7000, "token": SECRET}}}

        monkeypatch.setattr(tracking, "current_run", lambda: SimpleNamespace(outline=describe))
        settings = TensorBoardParameters(prediction_images=2)
        made.append(tracking.TrackedRun([TensorBoardTracker(settings, tmp_path / "tiny")]))
        return made[-1]

    yield make
    for tracker in made:
        tracker.end("interrupted")


def read(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


@needs_tensorboard
def test_a_training_and_what_resumes_it_are_one_folder_with_everything_once_and_no_secret(make_tracker, tmp_path):
    first = make_tracker(RUN)
    train(first, range(1, 7))
    first.end("interrupted", "Ctrl-C")
    second = make_tracker("2026-01-02T04.04.05.678Z")
    train(second)
    second.log_evaluation(METRICS, pictures)
    second.end("failed", f"failed with {SECRET}")
    (folder,) = (tmp_path / "tiny").iterdir()
    assert folder.name == RUN
    seen = read(folder)
    assert {point.step: point.value for point in seen.Scalars("train/loss")} == pytest.approx(losses())
    assert len(seen.Scalars("train/loss")) == 12
    assert [point.value for point in seen.Scalars("evaluation/tuned/CIDEr")] == [1.0]
    assert sorted(seen.Tags()["images"]) == ["Prediction/0", "Prediction/1"]
    (caption,) = seen.Tensors("Prediction/1/text_summary")[0].tensor_proto.string_val
    assert caption.decode() == "    base: a long one 1\n    tuned: short 1"
    told = seen.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"lora.target_modules" in told
    assert b'["q_proj", "v_proj"]' in told
    assert b"x" * 7000 in told
    stored = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"***" in stored
    assert SECRET.encode() not in stored


@needs_tensorboard
def test_a_folder_that_cannot_be_written_costs_one_line(make_tracker, tmp_path, caplog):
    (tmp_path / "tiny").write_text("a file where the folder should be")
    tracker = make_tracker(RUN)
    train(tracker)
    tracker.end("finished")
    (said,) = [record.getMessage() for record in caplog.records]
    assert "TensorBoard stopped recording this run" in said


def test_without_tensorboard_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ParameterError, match="TensorBoard is not installed: pip install 'tensorboard>=2.20'"):
        TensorBoardTracker(TensorBoardParameters(prediction_images=1), tmp_path)
