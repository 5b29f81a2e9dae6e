"""Launches that must leave no process behind."""

import os
import signal

import pytest

from cluster.processes import living, marked, wait_until
from cluster.works import launch


@pytest.fixture
def mark():
    """Of every process that the test starts; at its end none may be left."""
    with marked() as mark:
        yield mark
    assert wait_until(lambda: not living(mark), 10), living(mark)


@pytest.fixture
def on_ranks(mark, tmp_path, monkeypatch):
    """`on_ranks(work, argument)`: what two ranks give. Signals and the environment are as before, afterwards."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def go(work, argument, **options):
        environment = dict(os.environ)
        try:
            return launch(work, argument, **options)
        finally:
            assert {number: signal.getsignal(number) for number in handlers} == handlers
            assert dict(os.environ) == environment

    return go
