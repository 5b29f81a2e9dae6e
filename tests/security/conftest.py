"""Attackers' tools: a pickle that runs, a module that runs when imported, and the traces both leave."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from pipelines.conftest import fresh_run, newest, once, project, run  # noqa: F401  fixtures


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self):
        return Path.mkdir, (self._trace,)


@pytest.fixture
def trace(tmp_path) -> Path:
    """Is there when an attack ran."""
    return tmp_path / "the attack ran"


@pytest.fixture
def malicious_pickle(trace):
    """`malicious_pickle(path)`: what `torch.load` without weights_only would run."""

    def write(path: Path) -> None:
        torch.save({"weight": Payload(trace)}, path)

    return write


@pytest.fixture
def malicious_module(tmp_path, trace, monkeypatch):
    """`malicious_module("evil.part")`: a module on Python's path that runs when it is imported."""

    def write(name: str) -> None:
        file = (tmp_path / "modules" / name.replace(".", "/")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"import pathlib\npathlib.Path({str(trace)!r}).mkdir(exist_ok=True)\n")
        monkeypatch.syspath_prepend(tmp_path / "modules")

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
