"""Checkpoints of one training job: whole or absent, found again by the same command.

`<workspace>/training/<fingerprint>/inputs.json` says what the job is: its parts and their hashes.
`<workspace>/training/<fingerprint>/checkpoint-<step>/` holds adapter, optimizer, scheduler, RNG, state, files.json.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import MissingArtifactError, TrainingError
from qwen_vl_lora.modeling.base_model import digest
from qwen_vl_lora.modeling.fingerprints import file_sha256

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_FILES = "files.json"
_INPUTS = "inputs.json"


@dataclass(frozen=True)
class TrainingJob:
    """A training run's identity, and the folder where it keeps what it has so far.

    Attributes:
        inputs: name → hash or value of everything that decides the result.
        root: folder of all jobs of the recipe.
    """

    inputs: Mapping[str, Any]
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / digest(dict(self.inputs))[:16]

    def open(self) -> None:
        """Make the folder and note what the job is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / _INPUTS
        partial = note.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(dict(self.inputs), indent=2, sort_keys=True), encoding="utf-8")
        partial.replace(note)

    def close(self) -> None:
        """Forget the checkpoints of a finished job: it never resumes."""
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("*") if (match := _CHECKPOINT.search(path.name))]
        return [path for _, path in sorted(found)]

    def newest_whole_checkpoint(self) -> Path | None:
        """The newest checkpoint whose every file is what it was when written."""
        for path in reversed(self.checkpoints()):
            fault = _fault(path)
            if fault is None:
                return path
            logger.warning("Checkpoint %s is damaged (%s); falling back to the one before.", path, fault)
        return None

    def other_unfinished(self) -> list[str]:
        """For the newest unfinished job with other inputs: the names that differ."""
        others = [path for path in self.root.glob(f"*/{_INPUTS}") if path.parent != self.folder]
        others = [path for path in others if any(path.parent.glob("checkpoint-*"))]
        if not others:
            return []
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return differing(json.loads(newest.read_text(encoding="utf-8")), self.inputs)


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """`name: theirs → ours` for every input that is not the same."""
    ours = json.loads(json.dumps(dict(ours)))
    names = sorted(set(theirs) | set(ours))
    return [f"{name}: {theirs.get(name)} → {ours.get(name)}" for name in names if theirs.get(name) != ours.get(name)]


def find_checkpoint(job: TrainingJob, resume: str) -> Path | None:
    """Where training goes on, or None to start afresh.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint of the very same job.

    Raises:
        MissingArtifactError: if a named checkpoint is not there.
        TrainingError: if a named checkpoint is damaged or belongs to another job.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named_checkpoint(job, Path(resume))
    checkpoint = job.newest_whole_checkpoint()
    if checkpoint is not None:
        logger.info("Going on from %s of an unfinished run with the same data, parameters and base.", checkpoint)
    elif differences := job.other_unfinished():
        logger.info("An unfinished run is there, but it differs; starting afresh. %s", "; ".join(differences))
    return checkpoint


def _named_checkpoint(job: TrainingJob, path: Path) -> Path:
    if not path.is_dir():
        raise MissingArtifactError(f"resume names {path}, which is not there. Give a checkpoint's path, or auto.")
    note = path.parent / _INPUTS
    theirs = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if differences := differing(theirs, job.inputs):
        raise TrainingError(
            f"resume names {path}, but this run is another one: {'; '.join(differences)}. "
            "Give the same data, parameters and base, or resume: auto to start afresh."
        )
    fault = _fault(path)
    if fault is not None:
        raise TrainingError(f"resume names {path}, which is damaged: {fault}. Name another one, or use auto.")
    return path


def seal(folder: Path) -> None:
    """Note every file's hash, so that a damaged checkpoint is told from a whole one."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / _FILES).write_text(json.dumps(files, indent=2), encoding="utf-8")


def _fault(folder: Path) -> str | None:
    try:
        files = json.loads((folder / _FILES).read_text(encoding="utf-8"))
        for name, sha256 in files.items():
            if file_sha256(folder / name) != sha256:
                return f"{name} has other bytes"
    except (OSError, ValueError) as error:
        return str(error)
    return None
