"""The current run: its id, and what it has read and written so far.

A hook fills it. Artifacts read it to record what made them, and actions can be deferred to the end of the run.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen_vl_lora.exceptions import QwenVLLoraError

Artifact = dict[str, Any]
"""`version`, `path`, `sha256` and more of one dataset, as in a run record."""


class RunInterruptedError(QwenVLLoraError, RuntimeError):
    """The user or the machine stopped the run. Its state was saved first."""


@dataclass
class Run:
    """One `kedro run`.

    Attributes:
        id: Kedro's session id, which is also the version of everything the run writes.
        read: dataset → what was loaded.
        written: dataset → what was saved.
        facts: the rest of `record.json`, so far.
        at_end: functions to call when the run ends, with whether it finished.
    """

    id: str
    read: dict[str, Artifact] = field(default_factory=dict)
    written: dict[str, Artifact] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    at_end: list[Callable[[bool], None]] = field(default_factory=list)

    def outline(self) -> dict[str, Any]:
        """Summarize the run for a reader elsewhere: what ran on which versions, without files and surroundings."""
        artifacts = {**self.read, **self.written}
        known = {name: self.facts.get(name) for name in ("recipe", "pipelines", "env", "base_model", "parameters")}
        outline = {
            "run": self.id,
            "commit": (self.facts.get("git") or {}).get("commit"),
            "data": {name: _version(artifact) for name, artifact in sorted(artifacts.items())},
            **known,
        }
        return {name: value for name, value in outline.items() if value is not None}


def _version(artifact: Artifact) -> Any:
    return artifact.get("version") or artifact.get("sha256") or artifact.get("content_sha256")


_current: Run | None = None


def begin_run(run_id: str) -> Run:
    """Start a new current run."""
    global _current
    _current = Run(run_id)
    return _current


def end_run(*, finished: bool) -> None:
    """End the current run."""
    global _current
    ended, _current = _current, None
    for action in ended.at_end if ended is not None else []:
        action(finished)


def current_run() -> Run | None:
    """Return the current run, or None outside of a run (in a notebook, say)."""
    return _current


def at_run_end(action: Callable[[bool], None]) -> bool:
    """Call `action(finished)` when the current run ends. Outside of a run, do nothing and return False."""
    if _current is None:
        return False
    _current.at_end.append(action)
    return True


THIS_PROCESS = "this process"
"""The name of the run's own process, where a process is named."""


class Work:
    """What a node has done so far.

    Attributes:
        shares: how much of it each process did.
    """

    def __init__(self) -> None:
        self.shares: collections.Counter[str] = collections.Counter()
        self._begun = time.monotonic()
        self._first = (0, self._begun)

    def add(self, count: int, process: str = THIS_PROCESS) -> None:
        """Count what a process has finished."""
        self.shares[process] += count
        if not self._first[0]:
            self._first = (count, time.monotonic())

    def facts(self, unit: str) -> dict[str, Any]:
        """For a run record. The rate leaves out the time until the first part, in which processes and models start."""
        now, count = time.monotonic(), self.shares.total()
        first, at = self._first
        later, seconds = (count - first, now - at) if count > first else (count, now - self._begun)
        return {
            "unit": unit,
            "count": count,
            "seconds": round(now - self._begun, 3),
            "per_second": round(later / max(seconds, 1e-3), 3),
            "processes": dict(sorted(self.shares.items())),
        }


@contextlib.contextmanager
def recorded_work(node: str, unit: str) -> Iterator[Work]:
    """Context whose work stands in the run record afterwards: how much, how fast, by which processes.

    Nothing is recorded if there was nothing to do, or outside of a run.

    Args:
        unit: what is counted, such as `pictures`.
    """
    work = Work()
    try:
        yield work
    finally:
        if _current is not None and work.shares:
            _current.facts.setdefault("work", {})[node] = work.facts(unit)
