"""A Kedro-Viz server over a finished run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from finished_project import finished_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base_path):
    return finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))


@contextlib.contextmanager
def viz_server(project, *options, program="kedro", env=None) -> Iterator[str]:
    """The address of `kedro viz run`, or of `qwen-vl-lora viz`, for a project. Ends with its worker processes."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["viz", "run"] if program == "kedro" else ["viz"]
    command = [sys.executable, "-m", program, *words, "--no-browser", "--port", str(port), *options]
    with (project / "viz.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=project,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
        try:
            _wait_for(url, server, project)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=20)


def _free_port() -> int:
    """Below 49152: Kedro-Viz refuses the ports that the system would choose."""
    for port in range(30000 + os.getpid() % 10000, 49000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port from 30000 to 49000")


def _wait_for(url, server, project) -> None:
    for _ in range(300):
        try:
            get(f"{url}/api/main")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
        if server.poll() is not None:
            break
    raise AssertionError((project / "viz.log").read_text()[-3000:])


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def viz(finished):
    """The address of Kedro-Viz as `qwen-vl-lora viz` starts it."""
    with viz_server(finished, program="qwen_vl_lora") as url:
        yield url
