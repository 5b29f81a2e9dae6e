"""Evaluation writes no caption twice: the base's are made once, and a killed evaluation resumes."""

import json

import pytest
from kedro.framework.session import KedroSession

from pipelines.conftest import SMALL
from qwen_vl_lora.evaluation import comparison
from qwen_vl_lora.runs.records import read_records, runs_folder

FOLDER = "data/09_workspace/tiny/evaluation"


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that are decoded. `fail_after` of them are decoded before the process is killed."""
    decode, decoded = comparison.write_captions, []

    def count(model, processor, prompts, *others):
        if len(decoded) == count.fail_after:
            raise KeyboardInterrupt
        decoded.append(len(prompts))
        return decode(model, processor, prompts, *others)

    count.fail_after = None
    monkeypatch.setattr(comparison, "write_captions", count)
    return decoded, count


@pytest.fixture
def predictions(newest):
    return lambda: newest("07_model_output/tiny/predictions.csv").read_text()


def record(project):
    return read_records(runs_folder(project, "tiny"))[-1]


def test_another_adapter_is_evaluated_against_base_captions_that_were_made_before(
    evaluated, run, project, batches, predictions, caplog
):
    run("training", "evaluation", lora={"r": 2}, training_args={"learning_rate": 0.1}, **SMALL)
    decoded, _ = batches
    assert sum(decoded) == 6
    assert f"6 captions of base are taken from {FOLDER}/" in caplog.text
    told = record(project).facts["captions"]
    assert (told["base"]["taken"], told["tuned"]["taken"]) == (6, 0)
    assert (project / FOLDER / f"{told['base']['key']}.jsonl").is_file()
    kept = predictions()
    for file in (project / FOLDER).iterdir():
        file.unlink()
    run("evaluation", **SMALL)
    assert sum(decoded) == 6 + 12
    assert predictions() == kept


def test_a_killed_evaluation_resumes_on_both_sides(evaluated, run, project, batches, predictions):
    whole, (decoded, count) = predictions(), batches
    for file in (project / FOLDER).iterdir():
        file.unlink()
    for count.fail_after in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            run("evaluation", **SMALL)
    count.fail_after = None
    run("evaluation", **SMALL)
    assert decoded == [2] * 6
    assert predictions() == whole


def test_kept_captions_that_someone_changed_are_made_again(evaluated, run, project, batches, predictions, caplog):
    whole = predictions()
    for file in (project / FOLDER).iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines[0]["caption"] += " and a lie"
        file.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    run("evaluation", **SMALL)
    assert batches[0] == [2, 2]
    assert caplog.text.count("Damaged lines in") == 2
    assert predictions() == whole


def test_a_replay_writes_every_caption_itself(evaluated, run, project, batches, predictions):
    run("evaluation", **SMALL)
    assert batches[0] == []
    whole, files = predictions(), {file: file.read_bytes() for file in (project / FOLDER).iterdir()}
    stored = record(project).folder.relative_to(project) / "conf"
    with KedroSession.create(project_path=project, conf_source=str(stored), env="base") as session:
        session.run(pipeline_names=["evaluation"])
    assert batches[0] == [2] * 6
    assert predictions() == whole
    assert {file: file.read_bytes() for file in (project / FOLDER).iterdir()} == files
