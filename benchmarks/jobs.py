"""What one measurement is told, as a JSON file between the bench and its fresh subprocess.

Imports nothing heavy: the bench itself must stay small, because Linux counts the memory of the
process that starts a child into the child's peak.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One task in one process.

    Attributes:
        module: module of `benchmarks` that holds the task.
        task: function in it: takes the job, returns a dict that becomes part of the result.
        data: prepared folder: pictures, conversations, parameters. Also the working directory, since
            conversations name pictures relative to it.
        base: directory of the base model.
        scratch: fresh folder for caches and results of this process alone.
        threads: of torch.
        torch: import torch and the model's code before the clock starts.
        check: after the clock has stopped, also compute what must be equal on both sides.
        options: what only some tasks read.
    """

    module: str
    task: str
    data: Path
    scratch: Path
    base: Path | None = None
    threads: int = 2
    torch: bool = True
    check: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        """The resolved parameters both sides are told, with what `options.changes` says otherwise."""
        return overlaid(read_json(self.data / "parameters.json"), self.options.get("changes", {}))

    @property
    def base_path(self) -> Path:
        if self.base is None:
            raise ValueError(f"The task {self.module}.{self.task} needs a base model, but its job names none.")
        return self.base

    def conversations(self, split: str) -> list[dict[str, Any]]:
        """The conversations of `train`, `validation` or `test`."""
        records: list[dict[str, Any]] = read_json(self.data / f"{split}.json")
        return records

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Job:
        values = read_json(file)
        paths = {name: Path(values[name]) for name in ("data", "scratch", "base") if values[name] is not None}
        return cls(**{**values, **paths})


def overlaid(parameters: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Parameters with changes over them; blocks are merged key by key."""
    merged = {key: {**parameters[key], **value} for key, value in changes.items() if isinstance(value, dict)}
    return {**parameters, **changes, **merged}


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
