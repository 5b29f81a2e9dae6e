"""Several processes share a work; each fault is told by the rank that had it, and nothing stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import works
from cluster.processes import living, wait_until
from qwen_vl_lora.cluster.faults import Fault, root_of, to_error
from qwen_vl_lora.exceptions import CTRL_C, ClusterError, DataFormatError, MachineError
from qwen_vl_lora.runs.run import RunInterruptedError


def test_each_rank_gives_its_part_and_the_first_speaks_for_all(on_ranks, caplog, capfd):
    rows = []
    with caplog.at_level("INFO"):
        given = on_ranks(works.tell_who, {"pieces": 5}, on_row=rows.append)
    assert [part["rank"] for part in given] == [0, 1]
    assert all(part["numbers"] == [[0, 0.1], [1, 0.1]] for part in given)
    assert [part["pieces"] for part in given] == [{"pieces": 5}] * 2
    assert rows == [{"step": 0}, {"step": 1}, {"step": 2}]
    said = caplog.text + "".join(capfd.readouterr())
    assert "rank 0 speaks" in caplog.text
    assert "rank 0 warns" in said
    assert "rank 1" not in said
    others = Path("logs/rank-1.log").read_text()
    assert "rank 1 speaks" in others
    assert "rank 1 warns" in others


def test_nothing_but_the_loopback_interface_listens(on_ranks):
    listening = [address for part in on_ranks(works.listen, None) for address in part]
    assert listening
    assert {address.split(":")[0] for address in listening} <= {"0100007F", "00000000000000000000000001000000"}


def test_an_error_of_whoever_takes_the_rows_ends_the_ranks(on_ranks):
    def refuse(row):
        raise KeyError(row["step"])

    with pytest.raises(KeyError, match="0"):
        on_ranks(works.tell_who, None, on_row=refuse)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("expected", DataFormatError, r"^Rank 1 of 2: Picture 7 is bad\. Take another\.$"),
        ("killed", ClusterError, r"^Rank 1 of 2 was killed by SIGKILL"),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_own_error(on_ranks, fault, kind, message):
    with pytest.raises(kind, match=message) as caught:
        on_ranks(works.fail, fault)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("program", ClusterError, r"^Rank 1 of 2 ended with KeyError: 'nothing'$"),
        ("disk", MachineError, r"^Rank 1 of 2: No space left to write \(data/x\)"),
    ],
)
def test_what_a_rank_notes_of_its_error_is_raised_with_the_rank_and_the_traceback(fault, kind, message):
    echo = Fault.of(0, RuntimeError("Connection closed by peer"))  # heard first
    try:
        works.FAULTS[fault]()
    except Exception as error:
        cause = Fault.of(1, error)
    with pytest.raises(kind, match=message) as caught:
        raise to_error(root_of([echo, cause]), 2)
    assert type(caught.value) is kind
    assert "works.FAULTS[fault]()" in str(caught.value.__cause__)


def test_ctrl_c_ends_the_run_of_several_ranks_with_its_own_exit_code():
    stopped = RunInterruptedError("Stopped by SIGINT after step 5 of 8.")
    stopped.exit_code = CTRL_C
    error = to_error(Fault.of(0, stopped), 2)
    assert (type(error), str(error), error.exit_code) == (RunInterruptedError, str(stopped), CTRL_C)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", r"^No progress for 12 s: rank 1 \(step 3\) hangs while the others wait for it\."),
        ("stopped", r"^No sign of life for \d+ s from rank 1 \(step 3\): the process is stopped"),
    ],
)
def test_a_rank_that_hangs_is_named(on_ranks, fault, message):
    with pytest.raises(ClusterError, match=message):
        on_ranks(works.fail, fault, timeout=12)


@pytest.fixture
def launcher(tmp_path, mark):
    """A process whose two ranks wait, both of them there."""
    sign = tmp_path / "sign"
    script = [sys.executable, works.__file__, "here", str(sign)]
    paths = [str(Path(works.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(script, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
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
