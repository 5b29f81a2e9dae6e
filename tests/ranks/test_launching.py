"""Several processes share a work; each fault is told by the rank that had it, and nothing stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_vl_lora.exceptions import DataFormatError, LauncherError, MachineError
from qwen_vl_lora.ranks.errors import read_faults, record_fault, root_of, to_error
from ranks import works
from ranks.processes import living, wait_until


def test_each_rank_gives_its_part_and_the_first_speaks_for_all(on_ranks, caplog, capfd):
    rows = []
    with caplog.at_level("INFO"):
        given = on_ranks(works.tell_who, {"pieces": 5}, on_row=rows.append)
    assert [part["rank"] for part in given] == [0, 1]
    assert all(part["numbers"] == [[0, 0.1], [1, 0.1]] for part in given)
    assert [part["texts"] for part in given] == ["text 1", "text 0"]
    assert [part["share"] for part in given] == [[0, 2, 4], [1, 3]]
    assert rows == [{"step": 0}, {"step": 1}, {"step": 2}]
    said = caplog.text + "".join(capfd.readouterr())
    assert "rank 0 speaks" in caplog.text
    assert "rank 0 warns" in said
    assert "rank 1" not in said


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("expected", DataFormatError, r"^Rank 1 of 2: Picture 7 is bad\. Take another\.$"),
        ("killed", LauncherError, r"^Rank 1 of 2 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_own_error(on_ranks, fault, kind, message):
    with pytest.raises(kind, match=message) as caught:
        on_ranks(works.fail, {"fault": fault})
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("program", LauncherError, r"^Rank 1 of 2 ended with KeyError: 'nothing'$"),
        ("disk", MachineError, r"^Rank 1 of 2: There is no room left to write \(data/x\)"),
    ],
)
def test_what_a_rank_notes_of_its_error_is_raised_with_the_rank_and_the_traceback(tmp_path, fault, kind, message):
    record_fault(tmp_path, 0, RuntimeError("Connection closed by peer"))  # heard first, and only an echo
    try:
        works.FAULTS[fault]()
    except Exception as error:
        record_fault(tmp_path, 1, error)
    error = to_error(root_of(read_faults(tmp_path)), 2)
    with pytest.raises(kind, match=message) as caught:
        raise error
    assert type(caught.value) is kind
    assert "works.FAULTS[fault]()" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", r"^No progress for 12 s: rank 1 \(step 3\) hangs while the others wait for it\."),
        ("stopped", r"^No sign of life for \d+ s from rank 1 \(step 3\): the process is stopped"),
    ],
)
def test_a_rank_that_hangs_is_named(on_ranks, fault, message):
    with pytest.raises(LauncherError, match=message):
        on_ranks(works.fail, {"fault": fault}, timeout=12)


@pytest.fixture
def launcher(tmp_path, mark):
    """A process whose two ranks wait, both of them there."""
    sign = tmp_path / "sign"
    script = [sys.executable, works.__file__, str(tmp_path / "workspace"), str(sign)]
    paths = [str(Path(works.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(script, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(sign.exists, 120)
        assert len([line for line in living(mark).values() if "spawn_main" in line]) == 2
        yield process
        process.kill()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_ranks_end_with_their_launcher_however_it_ends(launcher, mark, number):
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    assert launcher.returncode == -number
    assert wait_until(lambda: not living(mark), 10), living(mark)
