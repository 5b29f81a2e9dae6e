"""Launches that must leave no process behind."""

import signal

import pytest

from ranks.processes import living, marked, wait_until
from ranks.works import launch


@pytest.fixture
def mark():
    """Of every process that the test starts; at its end none may be left."""
    with marked() as mark:
        yield mark
    assert wait_until(lambda: not living(mark), 10), living(mark)


@pytest.fixture
def on_ranks(tmp_path, mark):
    """`on_ranks(work, task)`: what two ranks give. Signals and the folder are as before, afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def go(work, task, **options):
        try:
            return launch(tmp_path, work, task, **options)
        finally:
            assert list((tmp_path / "launches").iterdir()) == []
            assert {number: signal.getsignal(number) for number in handlers} == handlers

    return go
