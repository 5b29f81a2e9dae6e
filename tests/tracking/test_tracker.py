"""A run is recorded whole on this machine, and in the cloud as far as the cloud lets it."""

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_vl_lora.tracking import swanlab
from tracking.cloud import KEY
from tracking.runs import METRICS, losses, pictures, records, row, synced, train, wait_for

CLOUD_FAULTS = {
    "errors": r"answers with an error \(500\)",
    "silent": "does not answer within 3 s",
    "revoked": r"refuses the key \(401\)",
}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "swanlab"


@pytest.fixture
def impatient(monkeypatch):
    """Two seconds for the cloud at the end of a run; others below wait the five that users do."""
    monkeypatch.setattr(swanlab, "CLOUD_SECONDS", 2)


@pytest.fixture(autouse=True)
def hear_all(caplog):
    caplog.set_level(logging.INFO)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def check_whole(run):
    """Everything that `train` and `log_evaluation` said is there."""
    assert run.curve("train/loss") == pytest.approx(losses())
    assert run.curve("train/learning_rate") == dict.fromkeys(range(1, 13), 1e-3)
    assert run.curve("evaluation/tuned/CIDEr") == {12: 1.0}
    assert run.pictures == {"Prediction": [text for _, text in pictures(2)]}
    assert run.config == {"data.adapter": "v1", "parameters.lora.r": 8}
    assert run.state == "FINISHED"


def whole_run(tracker):
    train(tracker)
    tracker.log_evaluation(METRICS, pictures)
    tracker.end("finished")


def describe():
    return {"data": {"adapter": "v1"}, "parameters": {"lora": {"r": 8, "layers_pattern": None}}}


def test_an_offline_run_is_whole_and_can_be_sent_later(make_tracker, folder, make_cloud, monkeypatch, caplog):
    there = make_cloud()
    monkeypatch.setenv("SWANLAB_API_HOST", there.address)
    tracker = make_tracker(describe)
    whole_run(tracker)
    assert there.received == []
    (record,) = records(folder)
    (said,) = [record.getMessage() for record in caplog.records]
    run_id = said.split()[said.split().index("--id") + 1]
    assert str(record) in said
    check_whole(synced(record, run_id, there))


def test_an_online_run_is_in_the_cloud_and_on_this_machine(make_tracker, folder, cloud, make_cloud, caplog):
    whole_run(make_tracker(describe, mode="online"))
    check_whole(cloud.run)
    assert not warnings(caplog)
    (record,) = records(folder)
    check_whole(synced(record, cloud.run.id, make_cloud()))


@pytest.mark.parametrize("fault", CLOUD_FAULTS)
def test_a_cloud_that_is_no_use_from_the_start_costs_no_time_and_no_record(
    make_tracker, folder, cloud, make_cloud, caplog, fault
):
    cloud.behaviour = fault
    tracker = make_tracker(describe, mode="online")
    began = time.monotonic()
    train(tracker)
    assert time.monotonic() - began < 3
    whole_run_end(tracker)
    (said, remedy) = warnings(caplog)
    assert "SwanLab's cloud is not used" in said
    check_message(CLOUD_FAULTS[fault], said)
    assert "swanlab sync --id" in remedy
    check_record(folder, remedy, make_cloud())


def whole_run_end(tracker):
    """The end of a run, in time."""
    began = time.monotonic()
    tracker.log_evaluation(METRICS, pictures)
    tracker.end("finished")
    assert time.monotonic() - began < 10


def check_message(pattern, said):
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(said)


def check_record(folder, remedy, elsewhere):
    """What the run says at its end brings everything to the cloud."""
    (record,) = records(folder)
    run_id = remedy.split()[remedy.split().index("--id") + 1]
    check_whole(synced(record, run_id, elsewhere))


@pytest.mark.parametrize("fault", ["errors", "silent", pytest.param("revoked", marks=pytest.mark.slow)])
def test_a_cloud_that_fails_in_the_middle_stops_nothing(
    impatient, make_tracker, folder, cloud, make_cloud, caplog, fault
):
    tracker = make_tracker(describe, mode="online")
    train(tracker, range(1, 7))
    wait_for(lambda: cloud.runs and cloud.run.curve("train/loss") == pytest.approx(losses(range(1, 7))))
    cloud.behaviour = fault
    began = time.monotonic()
    train(tracker, range(7, 13))
    assert time.monotonic() - began < 3
    whole_run_end(tracker)
    assert "watch the run at" in caplog.text
    check_record(folder, [record.getMessage() for record in caplog.records][-1], make_cloud())


@pytest.mark.parametrize("place", ["experiment", "presigned", "state"])
def test_a_cloud_that_falls_silent_anywhere_stops_nothing(
    impatient, make_tracker, folder, cloud, make_cloud, caplog, place
):
    cloud.after = {place: "silent"}
    tracker = make_tracker(describe, mode="online")
    train(tracker)
    whole_run_end(tracker)
    (remedy,) = warnings(caplog)
    assert "did not take the whole run" in remedy
    check_record(folder, remedy, make_cloud())


def test_what_the_cloud_missed_can_be_sent_to_the_same_run(make_tracker, folder, cloud, caplog):
    tracker = make_tracker(describe, mode="online")
    train(tracker, range(1, 7))
    wait_for(lambda: cloud.runs and cloud.run.curve("train/loss") == pytest.approx(losses(range(1, 7))))
    cloud.behaviour = "revoked"
    train(tracker, range(7, 13))
    whole_run_end(tracker)
    cloud.behaviour = "well"
    (record,) = records(folder)
    check_whole(synced(record, cloud.run.id, cloud))


def test_a_training_that_goes_on_finds_its_run_again(make_tracker, folder, cloud):
    first = make_tracker(describe, mode="online")
    train(first, range(1, 7))
    first.end("interrupted", "Ctrl-C")
    assert cloud.run.state == "ABORTED"
    assert cloud.run.logs == ["Ctrl-C"]
    whole_run(make_tracker(describe, mode="online"))
    check_whole(cloud.run)
    assert cloud.run.times_opened == 2
    one, two = records(folder)
    assert one.name.endswith(cloud.run.id)
    assert two.name.endswith(cloud.run.id)


def test_another_training_is_another_run(make_tracker, folder):
    for throughput in (10.0, 10.1):
        tracker = make_tracker()
        tracker.log_row({**row(1, 0.5), "samples_per_second": throughput})
        tracker.end("finished")
    one, two = records(folder)
    assert one.name[-21:] != two.name[-21:]


def test_nothing_logged_is_no_run(make_tracker, folder):
    tracker = make_tracker()
    tracker.end("finished")
    assert not records(folder)


def test_variables_of_older_tutorials_do_not_end_the_run(make_tracker, cloud, monkeypatch, caplog):
    monkeypatch.setenv("SWANLAB_PROJECT", "qwen")
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    whole_run(make_tracker(describe, mode="online"))
    check_whole(cloud.run)
    assert cloud.project == "a-project"
    assert warnings(caplog) == ["SWANLAB_MODE, SWANLAB_PROJECT in the environment: ignored, the swanlab block has it."]


def test_settings_of_the_working_directory_do_not_reach_the_run(make_tracker, folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SWANLAB_PROJECT=qwen\n")
    (tmp_path / "swanlab.yaml").write_text("mode: nonsense\n")
    whole_run(make_tracker())
    assert not warnings(caplog)
    assert len(records(folder)) == 1


def test_a_swanlab_that_cannot_start_costs_one_line(make_tracker, tmp_path, monkeypatch, caplog):
    (tmp_path / "swanlab.py").write_text("raise ImportError('a broken installation')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    whole_run(make_tracker())
    (said,) = warnings(caplog)
    assert "SwanLab has no complete record of this run: SwanLab cannot be imported: ImportError: a broken" in said


def test_a_folder_that_cannot_be_made_costs_one_line(make_tracker, folder, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    whole_run(make_tracker())
    (said,) = warnings(caplog)
    assert "SwanLab stopped recording this run (FileExistsError" in said


def test_pictures_are_thumbnails(make_tracker, cloud):
    from io import BytesIO

    from PIL import Image

    whole_run(make_tracker(mode="online"))
    sizes = {Image.open(BytesIO(data)).size for data in cloud.files.values()}
    assert len(cloud.files) == 2
    assert sizes == {(256, 183)}


PROCESS = """
import os, signal, sys
from pathlib import Path
from qwen_vl_lora.parameters import SwanLabParameters
from qwen_vl_lora.tracking.swanlab import SwanLabTracker
from qwen_vl_lora.tracking.tracker import TrackedRun
sys.path.insert(0, {tests!r})
from tracking.runs import train

named = dict(project="p", experiment_name="e", workspace=None, prediction_images=0)
tracker = TrackedRun([SwanLabTracker(SwanLabParameters(mode={mode!r}, **named), Path("swanlab"))])
train(tracker)
{ending}
"""


def run_process(tmp_path, mode, ending):
    tests = str(Path(__file__).parents[1])
    program = PROCESS.format(tests=tests, mode=mode, ending=ending)
    return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=60, check=False)


def test_a_killed_run_keeps_what_it_logged_and_is_marked(tmp_path, cloud, make_cloud):
    done = run_process(tmp_path, "online", "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: cloud.runs and cloud.run.state == "ABORTED")
    assert cloud.run.curve("train/loss") == pytest.approx(losses())
    (record,) = records(tmp_path / "swanlab")
    again = synced(record, cloud.run.id, make_cloud())
    assert again.curve("train/loss") == pytest.approx(losses())
    assert again.state == "ABORTED"


def test_a_sigterm_to_all_processes_leaves_the_record_to_the_run(make_tracker, folder, make_cloud):
    tracker = make_tracker(describe)
    train(tracker, range(1, 7))
    (told,) = tracker._trackers
    for writer in told._writers.values():
        wait_for(lambda writer=writer: writer.answer or writer.exchange(0.05))
        writer._process.terminate()
    train(tracker, range(7, 13))
    whole_run_end(tracker)
    (record,) = records(folder)
    check_whole(synced(record, record.name[-21:], make_cloud()))


@pytest.mark.parametrize(
    "ending", ["", pytest.param("raise SystemExit(3)", marks=pytest.mark.slow), "raise KeyboardInterrupt"]
)
def test_a_process_that_ends_before_its_run_closes_it(tmp_path, make_cloud, ending):
    run_process(tmp_path, "offline", ending)
    (record,) = records(tmp_path / "swanlab")
    again = synced(record, record.name[-21:], make_cloud())
    assert again.curve("train/loss") == pytest.approx(losses())
    assert (again.state, again.logs) == ("ABORTED", ["The process ended before the run did."])


def test_a_process_leaves_a_silent_cloud_in_time(tmp_path, cloud):
    cloud.after = {"house/metrics": "silent"}
    began = time.monotonic()
    run_process(tmp_path, "offline", "")
    offline = time.monotonic() - began
    began = time.monotonic()
    run_process(tmp_path, "online", "")
    assert time.monotonic() - began < offline + 10


SECRETS = ("ghp_abcdefghijklmnopqrstuvwx0123", "hunter2", "sk-abcdefghijklmnopqrst")


def test_no_secret_is_stored_or_sent(make_tracker, folder, cloud):
    def tell_all():
        return {
            "parameters": {"captions_file": f"https://me:{SECRETS[1]}@host/x.csv", "prompt": {"user": SECRETS[2]}},
            "base_model": {"token": SECRETS[0], "name": f"owner/name?token={SECRETS[0]}"},
        }

    tracker = make_tracker(tell_all, mode="online", experiment_name=f"of {SECRETS[0]}")
    train(tracker)
    tracker.log_evaluation(METRICS, pictures)
    tracker.end("failed", f"failed with password={SECRETS[1]} and {SECRETS[2]}")
    stored = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    sent = b"".join(cloud.received)
    assert cloud.run.state == "CRASHED"
    assert any(b"***" in content for content in stored)
    assert b"***" in sent
    for secret in (*SECRETS, KEY):
        assert not any(secret.encode() in content for content in stored), secret
    for secret in SECRETS:
        assert secret.encode() not in sent, secret
