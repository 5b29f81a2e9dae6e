"""The current run: its id, and what it has read and written so far.

A hook fills it. Artifacts read it to record what made them, and actions can be deferred to the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable
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
