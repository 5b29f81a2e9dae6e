"""A process that is forked from the warm parent is what `python` itself would have started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import warm
from cluster.processes import wait_until
from command_line import environment


@pytest.fixture
def script(tmp_path):
    """`script("code")`: the command that runs it as a file."""

    def write(code):
        (tmp_path / "script.py").write_text(code)
        return [sys.executable, str(tmp_path / "script.py"), "one", "two words"]

    return write


@pytest.fixture
def run(script, tmp_path):
    return lambda code, **options: warm.run(script(code), **{"cwd": tmp_path, "env": environment(), **options})


def test_it_has_its_own_arguments_folder_environment_and_streams(run, tmp_path):
    code = "import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['ONE'], 'TWO' in os.environ, __name__)\n"
    done = run(code + "print('bad', file=sys.stderr)", env={**environment(), "ONE": "1"})
    assert done.stdout == f"['one', 'two words'] {tmp_path} 1 False __main__\n"
    assert (done.stderr, done.returncode) == ("bad\n", 0)
    assert run("import os; os.write(2, b'x'); print('y')", stderr=subprocess.STDOUT).stdout == "xy\n"


def test_it_begins_with_the_libraries_and_is_nobodys_child_that_pytest_started(run):
    said = run("import os, sys; print('transformers.trainer' in sys.modules, 'kedro' in sys.modules, os.getppid())")
    loaded, kedro, parent = said.stdout.split()
    assert (loaded, kedro) == ("True", "False")
    assert int(parent) != os.getpid()


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("raise SystemExit", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, ""),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'end')", 0, ""),
        ("import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('end'))).start()", 0, ""),
    ],
)
def test_it_ends_as_python_ends(run, code, status, said):
    done = run(code)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert done.stdout == ("end\n" if "end" in code else "")


def test_it_is_read_written_signalled_and_waited_for(script, tmp_path):
    code = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(input(), flush=True)
signal.pause()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with warm.start(script(code), cwd=tmp_path, env=environment(), **pipes) as process:
        process.stdin.write("a line\n")
        process.stdin.flush()
        assert process.stdout.readline() == "a line\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        process.terminate()
        assert process.wait(timeout=60) == 7
    process.kill()  # of a process that is gone: nobody else gets the signal
    assert wait_until(lambda: not os.path.exists(f"/proc/{process.pid}"), 5)  # noqa: PTH110


def test_two_of_them_draw_different_random_numbers(run):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    assert len({number for _ in range(2) for number in run(code).stdout.split()}) == 4


def test_another_program_and_inline_code_begin_cold(tmp_path):
    done = warm.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], cwd=tmp_path)
    assert done.stdout == "False\n"


def test_what_the_libraries_set_in_pytest_makes_no_second_parent(run, monkeypatch):
    run("")
    folder = Path(os.environ[warm.FOLDER])
    before = sorted(folder.iterdir())
    import qwen_vl_lora.settings  # noqa: F401

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert run("import os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])", env=environment()).stdout == "elsewhere\n"
    assert sorted(folder.iterdir()) == before
