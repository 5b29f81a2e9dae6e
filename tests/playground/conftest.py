"""A finished project with a second adapter, and the playground's server over it."""

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
from pathlib import Path

import pytest

from finished_project import finished_project
from qwen_vl_lora.runs.adapters import ADAPTER
from qwen_vl_lora.runs.records import all_records

SECOND = "2026-01-02T00.00.00.000Z"


@pytest.fixture(scope="module")
def project(tmp_path_factory, base_path):
    """A project with a finished run and, of a later run, an adapter that says other things."""
    project = finished_project(tmp_path_factory.getbasetemp(), base_path("qwen2_vl"))
    (record,) = [one for one in all_records(project) if ADAPTER in one.written]
    add_adapter(project, record)
    return project


def add_adapter(project: Path, record) -> None:
    """Another run that trained, with weights of the opposite sign."""
    import shutil

    from safetensors.torch import load_file, save_file

    written = record.written[ADAPTER]
    old = project / written["path"]
    new = Path(written["path"].replace(written["version"], SECOND))
    shutil.copytree(old, project / new)
    weights = load_file(project / new / "adapter_model.safetensors")
    turned = {name: -40 * value if "lora_B" in name else value for name, value in weights.items()}
    save_file(turned, project / new / "adapter_model.safetensors", metadata={"format": "pt"})
    folder = record.folder.with_name(SECOND)
    folder.mkdir()
    facts = {**record.facts, "id": SECOND, "order": record.order + 1, "sequence": record.sequence + 1, "stages": {}}
    facts["datasets"] = {"read": record.read, "written": {ADAPTER: {**written, "version": SECOND, "path": str(new)}}}
    facts["results"] = {}
    (folder / "record.json").write_text(json.dumps(facts), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def playground_server(project: Path, *options: str, **environment: str) -> Iterator[str]:
    """The address of `qwen-vl-lora playground` for a project, as soon as it answers."""
    port = free_port()
    words = ["playground", "--no-browser", "--port", str(port), "--params", "device=cpu", *options]
    with (project / "playground.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "qwen_vl_lora", *words],
            cwd=project,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/", server, project)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                raise


def wait_for(url: str, server: subprocess.Popen, project: Path) -> None:
    while server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=30):
            return
        time.sleep(0.05)
    raise AssertionError((project / "playground.log").read_text()[-3000:])
