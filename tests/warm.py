"""Processes that begin with the heavy libraries imported: forks of a parent that imported them once for all tests.

A process of `python -m kedro` spends ten times longer on importing torch, transformers and peft than on the work of a
test. `Process` is what tests use of `subprocess.Popen`: a process of its own with its own id, environment, folder and
streams, which can be killed. What a test is about (a start without torch, a limit, other rights) has to begin cold.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import inspect
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

LIBRARIES = """
    torch torchvision bitsandbytes pandas numpy scipy.stats PIL.Image plotly.express plotly.io narwhals pydantic
    pydantic.main dynaconf omegaconf pathspec click rich.logging rich.console rich.progress jinja2 fsspec more_itertools
    multiprocessing.pool yaml
"""
HUGGING_FACE = """
    peft accelerate safetensors.torch qwen_vl_utils transformers.trainer transformers.models.auto.modeling_auto
    transformers.models.auto.processing_auto transformers.models.qwen2_vl.modeling_qwen2_vl
    transformers.models.qwen2_vl.processing_qwen2_vl transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
"""
"""Imported where no HF_ variable is set: these libraries read them at their import."""

READ_AT_IMPORT = ("TRANSFORMERS_", "TORCH", "PYTORCH", "OMP_", "OPENBLAS", "MKL_", "PYTHON", "LD_", "TF_", "USE_")
SET_AT_IMPORT = ("OMP_WAIT_POLICY", "TORCHINDUCTOR_CACHE_DIR")
"""What this project's settings and torch set in whoever imports them, pytest too: no reason for another parent."""
FOLDER = "WARM_PARENTS"


class Process:
    """A process forked from the warm parent, as `subprocess.Popen` shows it.

    Args:
        command: `[sys.executable, "-m", module, …]`, or `[sys.executable, "script.py", …]`.
        stdin, stdout, stderr: a file, a descriptor or PIPE; STDOUT for the last; None for no input and our own outputs.
    """

    def __init__(self, parent: Path, command: Sequence[str], *, cwd, env, stdin=None, stdout=None, stderr=None) -> None:
        self.args, self.returncode = command, None
        self.stdin, self.stdout, self.stderr = None, None, None
        nothing = os.open(os.devnull, os.O_RDWR)
        self._status, status = os.pipe()
        theirs = [nothing, status]
        given = []
        for number, (name, wanted) in enumerate({"stdin": stdin, "stdout": stdout, "stderr": stderr}.items()):
            if wanted == subprocess.PIPE:
                reading, writing = os.pipe()
                ours, fd = (writing, reading) if name == "stdin" else (reading, writing)
                setattr(self, name, os.fdopen(ours, "w" if name == "stdin" else "r", encoding="utf-8"))
                theirs.append(fd)
            elif wanted == subprocess.STDOUT:
                fd = given[1]
            elif wanted in (None, subprocess.DEVNULL):
                fd = nothing if name == "stdin" or wanted else number
            else:
                fd = wanted if isinstance(wanted, int) else wanted.fileno()
            given.append(fd)
        order = {"command": [str(word) for word in command[1:]], "cwd": str(cwd), "env": dict(env)}
        words = json.dumps(order).encode()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(parent))
            socket.send_fds(connection, [len(words).to_bytes(4, "big")], [*given, status])
            connection.sendall(words)
            for fd in theirs:
                os.close(fd)
            self.pid = int.from_bytes(connection.recv(4), "big")

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int.from_bytes(os.read(self._status, 4), "big", signed=True)
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        end = None if timeout is None else time.monotonic() + timeout
        said = {}
        streams = {name: stream for name in ("stdout", "stderr") if (stream := getattr(self, name)) is not None}
        readers = [
            threading.Thread(target=lambda name=name, stream=stream: said.update({name: stream.read()}), daemon=True)
            for name, stream in streams.items()
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if end is None else max(0, end - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        self._close()
        return said.get("stdout"), said.get("stderr")

    def send_signal(self, by: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, by)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _close(self) -> None:
        for stream in filter(None, (self.stdin, self.stdout, self.stderr)):
            stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        self._close()
        self.wait()


def start(command: Sequence[str], *, cwd, env: Mapping[str, str] | None = None, **streams):
    """A `Process` for a module or script of this Python, text streams; anything else begins cold, as a Popen."""
    env = os.environ if env is None else env
    streams.pop("text", None)
    if command[0] != sys.executable or not (command[1] == "-m" or str(command[1]).endswith(".py")):
        return subprocess.Popen(command, cwd=cwd, env=env, text=True, **streams)
    return Process(_parent(env), command, cwd=cwd, env=env, **streams)


def run(command: Sequence[str], *, cwd, env=None, timeout: float = 240, **streams) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text streams, warm where `start` is."""
    with start(
        command, cwd=cwd, env=env, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    ) as process:
        try:
            said, complained = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def _parent(env: Mapping[str, str]) -> Path:
    """The socket of a parent whose imports saw what this environment says of them; started by whoever asks first."""
    everything = not any(name.startswith("HF_") for name in env)
    own = {*SET_AT_IMPORT, "PYTHONPATH"}
    read = {name: env[name] for name in env.keys() - own if name.startswith(READ_AT_IMPORT)}
    key = hashlib.sha256(json.dumps([everything, read], sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(os.environ[FOLDER])
    place = folder / key
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            names = (LIBRARIES + HUGGING_FACE * everything).split()
            plain = {name: value for name, value in env.items() if not name.startswith("HF_") and name != "PYTHONPATH"}
            plain["OMP_WAIT_POLICY"] = "PASSIVE"  # as settings.py sets it before torch is imported
            with (folder / f"{key}.log").open("w") as log:
                parent = subprocess.Popen(
                    [sys.executable, __file__, str(place), *names], cwd=folder, env=plain, stdout=log, stderr=log
                )
            while not place.exists():
                assert parent.poll() is None, (folder / f"{key}.log").read_text()
                time.sleep(0.05)
            parent.returncode = 0  # nobody waits for it: it ends with pytest
    return place


def keep_parents() -> None:
    """Let the processes of this pytest share their parents, which end with it."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix=f"warm-{os.getpid()}-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


class Parent:
    """Imports, then forks a process for each order until pytest is gone."""

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self._pytest = int(place.parent.name.split("-")[1])
        sys.path.pop(0)  # the folder of this file
        for name in names:
            importlib.import_module(name)
        inspect.getmodule = functools.partial(module_of, inspect.getmodule)
        gc.collect()
        gc.freeze()  # or each process would read, and so copy, all of it in its first garbage collection
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: pytest ends what it started
        self._listener = socket.socket(socket.AF_UNIX)
        hidden = place.with_suffix(".new")
        self._listener.bind(str(hidden))
        self._listener.listen(64)
        self._listener.settimeout(1)
        hidden.rename(place)

    def serve(self) -> Callable[[], None] | None:
        """What a forked process has to run; None in the parent, at the end."""
        while self._pytest_lives():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                connection = None
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if connection is not None and (work := self._answer(connection)) is not None:
                return work
        return None

    def _pytest_lives(self) -> bool:
        try:
            os.kill(self._pytest, 0)
        except ProcessLookupError:
            return False
        return True

    def _answer(self, connection: socket.socket) -> Callable[[], None] | None:
        connection.settimeout(None)
        length, fds, _, _ = socket.recv_fds(connection, 4, 4)
        order = json.loads(_read(connection, int.from_bytes(length, "big")))
        if os.fork():
            connection.close()
            for fd in fds:
                os.close(fd)
            return None
        self._listener.close()
        *streams, status = fds
        child = os.fork()
        if child:
            for fd in streams:
                os.close(fd)
            connection.sendall(child.to_bytes(4, "big"))
            connection.close()
            _, ended = os.waitpid(child, 0)
            os.write(status, os.waitstatus_to_exitcode(ended).to_bytes(4, "big", signed=True))
            os._exit(0)
        connection.close()
        os.close(status)
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        for fd in streams:
            os.close(fd)
        return functools.partial(begin, **order)


def module_of(ask: Callable[..., Any], value: Any, *named: str) -> Any:
    """`inspect.getmodule`, which for a frame asks thousands of modules for their files. Dynaconf looks at the stack."""
    return sys.modules.get(value.f_globals.get("__name__", "")) if inspect.isframe(value) else ask(value, *named)


def _read(connection: socket.socket, length: int) -> bytes:
    read = b""
    while len(read) < length:
        read += connection.recv(length - len(read))
    return read


def begin(command: list[str], cwd: str, env: dict[str, str]) -> None:
    """Become what `python -m` would have been."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # the parent's remember what kind of file theirs were
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    numpy.random.seed()  # a new process begins with a state of its own
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    importlib.invalidate_caches()
    os._exit(_exit_code(command))


def _exit_code(command: list[str]) -> int:
    """Run a module or a script to the end of its process, without the seconds in which Python takes torch apart."""
    code: Any = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as asked:
        code = asked.code or 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # the two that Python itself calls at its end
    atexit._run_exitfuncs()
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    return code & 0xFF


if __name__ == "__main__":
    work = Parent(Path(sys.argv[1]), sys.argv[2:]).serve()
    if work is None:
        os._exit(0)
    work()
