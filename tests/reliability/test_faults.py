"""When the machine fails: one clear message, no damage, and the same command goes on afterwards.

Every fault here is real: a disk of a few megabytes, a read-only mount, a process without its rights, a limit of memory,
a pipe that nobody reads. Without `machine_fault` in console.py each ends in a page of traceback; without the staging
folder of `AtomicVersionedDataset.save` the full disk leaves half a file as the newest version.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from cluster.processes import wait_until
from command_line import TRAINING_SLICE, call, kedro_run, start
from reliability.artifacts import assert_nothing_was_lost, assert_one_message, assert_whole, snapshot
from reliability.conftest import SOMEBODY_ELSE

DATA = "data_engineering"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files to somebody else needs root")


# --- disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kilobytes", [0, 40, 80, 120])
def test_a_full_disk_is_one_message_and_earlier_versions_stay(disk, kilobytes):
    before = snapshot(disk.path)
    disk.leave(kilobytes)
    result = call(kedro_run(DATA), disk.path)
    assert_one_message(result, "No space left to write", "Free now:", "of 8.0 MiB in", "Free some space")
    assert_nothing_was_lost(before, disk.path)
    runs = disk.path / "data/08_reporting/tiny/runs"
    assert all((run / "record.json").stat().st_size for run in runs.iterdir())
    disk.make_room()
    assert call(kedro_run(DATA), disk.path).returncode == 0
    assert_nothing_was_lost(before, disk.path)


def test_a_disk_that_fills_up_in_training_leaves_only_whole_checkpoints(disk, base_path):
    command = kedro_run("training", base_model=base_path("qwen2_vl"), **TRAINING_SLICE)
    before = snapshot(disk.path)
    disk.leave(700)  # features and the log fit; a checkpoint of 1.3 MB does not
    assert_one_message(call(command, disk.path), "No space left to write", "Free some space")
    assert_nothing_was_lost(before, disk.path)
    assert not list((disk.path / "data/09_workspace").rglob("checkpoint-*/files.json"))
    disk.make_room()
    result = call(command, disk.path)
    assert result.returncode == 0, result.stderr
    assert list((disk.path / "data/06_models/tiny/adapter").glob("*/adapter/adapter_model.safetensors"))


def test_a_disk_mounted_read_only_is_one_message(disk):
    before = snapshot(disk.path)
    disk.remount("ro")
    try:
        result = call(kedro_run(DATA), disk.path)
    finally:
        disk.remount("rw")
    assert_one_message(result, "Cannot write", "mounted read-only", str(disk.path / "data"))
    assert_nothing_was_lost(before, disk.path)


# --- permissions -----------------------------------------------------------------------------


def give_away(path, mode=0o555):
    os.chown(path, SOMEBODY_ELSE, SOMEBODY_ELSE)
    path.chmod(mode)


@needs_root
def test_data_of_somebody_else_is_one_message_that_says_whose(project, without_rights):
    before = snapshot(project)
    for path in [project / "data", *(project / "data").rglob("*")]:
        give_away(path, 0o755 if path.is_dir() else 0o644)
    result = call(kedro_run(DATA, prefix=without_rights), project)
    assert_one_message(result, "Access denied", f"belongs to user {SOMEBODY_ELSE} with mode 755", "chown")
    assert_nothing_was_lost(before, project)


@needs_root
@pytest.mark.parametrize("artifact", ["02_intermediate/tiny/samples.json", "08_reporting/tiny/image_sheet.png"])
def test_a_folder_that_lost_its_permission_is_named(project, without_rights, artifact):
    before = snapshot(project)
    give_away(project / "data" / artifact)
    result = call(kedro_run(DATA, prefix=without_rights), project)
    assert_one_message(result, "Access denied", artifact, "with mode 555")
    assert_nothing_was_lost(before, project)


@needs_root
def test_an_artifact_that_may_not_be_read_is_named(project, without_rights, base_path):
    (conversations,) = (project / "data/05_model_input/tiny/train_conversations.json").glob("*/*.json")
    give_away(conversations, 0o000)
    settings = {**TRAINING_SLICE, "base_model": base_path("qwen2_vl"), "swanlab.mode": "disabled"}
    command = kedro_run("training", prefix=without_rights, **settings)
    assert_one_message(call(command, project), "Access denied", "train_conversations.json", "with mode 0")


# --- memory ----------------------------------------------------------------------------------

WITH_LITTLE_MEMORY = """
import resource, runpy, sys
import kedro.framework.cli, pandas, plotly.graph_objects, qwen_vl_lora.samples.collection
megabytes, *arguments = sys.argv[1:]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, [used + int(megabytes) * 2**20] * 2)
sys.argv = ["kedro", *arguments]
runpy.run_module("kedro", run_name="__main__")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_memory_that_runs_out_is_one_message_and_no_row_is_blamed(project):
    folder = project / "mine"
    folder.mkdir()
    Image.new("RGB", (9900, 9900), "teal").save(folder / "large.png")  # 280 MiB when decoded
    Image.new("RGB", (64, 64), "red").save(folder / "small.png")
    (folder / "captions.csv").write_text("image_path,caption\nsmall.png,Red.\nlarge.png,Teal.\n")
    before = snapshot(project)
    arguments = kedro_run(DATA, env="own_captions", captions_file="mine/captions.csv")[3:]
    result = call([sys.executable, "-c", WITH_LITTLE_MEMORY, "200", *arguments], project)
    assert_one_message(result, "Out of main memory", "This process used", "ulimit -v", "image.max_source_pixels")
    assert_nothing_was_lost(before, project)
    assert not (project / "data/02_intermediate/own_captions/rejected_samples.csv").exists()


OPEN_FILES = """
import os, resource, sys
from pathlib import Path
from qwen_vl_lora.samples.image_stage import read_allowed_file
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
read_allowed_file(sys.argv[1], [str(Path(sys.argv[1]).parent)])
"""


def test_a_good_picture_is_not_rejected_because_the_machine_ran_out_of_something(tmp_path):
    """Without `_NOT_THE_FILES_FAULT` the row would be quarantined as `unreadable_file`."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    result = subprocess.run(
        [sys.executable, "-c", OPEN_FILES, str(picture)], capture_output=True, text=True, check=False
    )
    assert "OSError: [Errno 24] Too many open files" in result.stderr
    assert "RowError" not in result.stderr


# --- output ----------------------------------------------------------------------------------


def test_a_reader_that_goes_away_stops_the_run_in_order(project):
    before = snapshot(project)
    process = start(kedro_run(DATA), project, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process.stderr as messages:
        process.stdout.readline()
        process.stdout.close()
        said = messages.read()
    process.wait(timeout=120)
    assert_one_message(subprocess.CompletedProcess([], process.returncode, "", said), "its output was closed")
    assert_nothing_was_lost(before, project)


def test_a_log_file_on_a_full_disk_stops_the_run_in_order(disk, project):
    before = snapshot(project)
    (disk.path / "run.log").write_bytes(b"x" * 4095 + b"\n")  # the disk's block is full: the next line wants another
    disk.leave(0)
    with (disk.path / "run.log").open("a") as log:
        result = call(kedro_run(DATA), project, stdout=log)
    assert_one_message(result, "No space left to write", f"{disk.path}/run.log", "Free now: 0 B of 8.0 MiB")
    assert_nothing_was_lost(before, project)


def test_a_full_pipe_is_waited_for_and_no_line_is_lost(project):
    """The writing end does not block, as some terminals and supervisors leave it. Read once the run waits for it."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    os.write(writing, b"x" * 4000 + b"\n")  # the run's first lines find no room
    process = start(kedro_run(DATA), project, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    lines: list[bytes] = []

    def read_late():
        wait_until(lambda: "pipe_write" in Path(f"/proc/{process.pid}/wchan").read_text(), 20)
        with os.fdopen(reading, "rb") as stream:
            lines.extend(stream)

    reader = threading.Thread(target=read_late)
    reader.start()
    with process.stderr as messages:
        said = messages.read()
    assert process.wait(timeout=120) == 0, said
    reader.join(30)
    text = b"".join(lines).decode()
    assert "Logging error" not in said
    for node in ("collect_samples", "build_conversations", "split_conversations", "describe_captions"):
        assert f"{node}: " in text
    assert_whole(project)
