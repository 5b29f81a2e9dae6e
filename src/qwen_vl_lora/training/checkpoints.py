"""Checkpoints of one training job. They are written atomically and found again by the same command.

`<workspace>/training/<fingerprint>/inputs.json` identifies the job: its inputs and their hashes.
`<workspace>/training/<fingerprint>/checkpoint-<step>/` holds adapter, optimizer, random numbers, state and files.json.
`<workspace>/training/<fingerprint>/parent.txt` names the adapter that `init_adapter` chose.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import MissingArtifactError, TrainingError
from qwen_vl_lora.runs.artifacts import digest, relative
from qwen_vl_lora.runs.comparison import differing_settings
from qwen_vl_lora.runs.run import at_run_end, current_run
from qwen_vl_lora.runs.storage import Lock, discard, file_sha256, leftovers, replace, sync_tree, write_whole

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_FILES = "files.json"
_INPUTS = "inputs.json"
STATE_FILE = "state.json"
_OLDER_STATE = "trainer_state.json"
INCOMING = ".incoming"
LOCK_FILE = ".lock"
PARENT_FILE = "parent.txt"


@dataclass
class TrainingJob:
    """The identity of a training, and its folder for unfinished work.

    A second process that runs the same job at the same time gets a folder of its own.

    Attributes:
        inputs: name → hash or value of every input that decides the result.
        parent: path of the adapter that it continues from, which must stay as long as the job can be resumed.
        root: folder of all jobs of the recipe.
        folder: of this job; final after `open`.
    """

    inputs: Mapping[str, Any]
    root: Path
    parent: str | None = None
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self._name = digest(dict(self.inputs))[:16]
        self._is_done = False
        self.folder = self.root / self._name

    def open(self) -> None:
        """Lock the folder, remove what a killed run left in it, and write the job's inputs."""
        self.folder = next(folder for folder in self._folders() if _take(folder))
        at_run_end(self._leave)
        for path in [*leftovers(self.folder), self.folder / INCOMING]:
            shutil.rmtree(path, ignore_errors=True)
        write_whole(self.folder / _INPUTS, json.dumps(dict(self.inputs), indent=2, sort_keys=True))
        _make_newest(self.folder / _INPUTS, self.root.glob(f"*/{_INPUTS}"))
        if self.parent is not None:
            write_whole(self.folder / PARENT_FILE, self.parent)

    def close(self) -> None:
        """Remove the checkpoints when the run has finished, because a finished run never resumes.

        Until then they are kept: a run that dies before all its artifacts are saved resumes from the last one.
        """
        self._is_done = True
        if current_run() is None:
            self._leave(finished=True)

    def _leave(self, finished: bool) -> None:
        if finished and self._is_done:
            for path in self.checkpoints():
                discard(path)
        _give_back(self.folder)

    def _folders(self) -> Iterator[Path]:
        yield self.root / self._name
        yield from (self.root / f"{self._name}-{number}" for number in itertools.count(2))

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("*") if (match := _CHECKPOINT.match(path.name))]
        return [path for _, path in sorted(found)]

    def newest_whole_checkpoint(self) -> Path | None:
        """The newest checkpoint whose files all have their recorded hashes. Newer, damaged ones are removed."""
        for path in reversed(self.checkpoints()):
            if (path / _OLDER_STATE).is_file():
                logger.warning("Checkpoint %s was written by an older version, which is not resumed.", path)
                discard(path)
                continue
            fault = _fault(path) or _fault_of_best(path)
            if fault is None:
                return path
            logger.warning("Checkpoint %s is damaged (%s); trying the one before it.", path, fault)
            discard(path)
        return None

    def other_unfinished(self) -> list[str]:
        """The inputs in which the newest other unfinished job differs."""
        others = [path for path in self.root.glob(f"*/{_INPUTS}") if not path.parent.name.startswith(self._name)]
        others = [path for path in others if any(path.parent.glob("checkpoint-*"))]
        if not others:
            return []
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return differing(json.loads(newest.read_text(encoding="utf-8")), self.inputs)


def _make_newest(file: Path, files: Iterable[Path]) -> None:
    """Give a file the newest time of all: it shows which training began last, and the clock may have been set back."""
    with contextlib.suppress(FileNotFoundError):  # another run has just removed one
        newest = max((path.stat().st_mtime_ns for path in files if path != file), default=0)
        if file.stat().st_mtime_ns <= newest:
            os.utime(file, ns=(newest + 1000, newest + 1000))


_taken: dict[Path, Lock] = {}
"""Job folders locked by this process. A notebook may retry a failed training in the same process."""


def _take(folder: Path) -> bool:
    if folder in _taken:
        return True
    lock = Lock(folder / LOCK_FILE)
    if lock.acquire():
        _taken[folder] = lock
        return True
    return False


def _give_back(folder: Path) -> None:
    lock = _taken.pop(folder, None)
    if lock is not None:
        lock.release()


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """`lora.r: theirs → ours` for every input that is not the same."""
    return differing_settings(theirs, json.loads(json.dumps(dict(ours))))


def find_checkpoint(job: TrainingJob, resume: str) -> Path | None:
    """The checkpoint that training resumes from, or None to start from the beginning.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint of the same job.

    Raises:
        MissingArtifactError: if a named checkpoint is not found.
        TrainingError: if a named checkpoint is damaged or belongs to another job.
    """
    if resume == "never":
        for path in job.checkpoints():
            discard(path)
        return None
    if resume != "auto":
        return _named_checkpoint(job, Path(resume))
    checkpoint = job.newest_whole_checkpoint()
    if checkpoint is not None:
        logger.info(
            "Resuming from %s of an unfinished run with the same data, parameters and base.",
            relative(checkpoint, Path.cwd()),
        )
    elif differences := job.other_unfinished():
        logger.info("Found an unfinished run with other inputs; starting afresh. %s", "; ".join(differences))
    return checkpoint


def _named_checkpoint(job: TrainingJob, path: Path) -> Path:
    if not path.is_dir():
        raise MissingArtifactError(f"resume names {path}, which was not found. Give a checkpoint's path, or auto.")
    note = path.parent / _INPUTS
    theirs = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if differences := differing(theirs, job.inputs):
        raise TrainingError(
            f"resume names {path}, which belongs to another run: {'; '.join(differences)}. "
            "Use the same data, parameters and base, or resume: auto to start from the beginning."
        )
    if (path / _OLDER_STATE).is_file():
        raise TrainingError(f"resume names {path}, which an older version wrote. It cannot be resumed. Use auto.")
    fault = _fault(path) or _fault_of_best(path)
    if fault is not None:
        raise TrainingError(f"resume names {path}, which is damaged: {fault}. Name another checkpoint, or use auto.")
    _bring_best(path, job.folder)
    return path


def _bring_best(checkpoint: Path, folder: Path) -> None:
    """Copy the best step of a training that began in another folder, because it may be published."""
    best = _best_of(checkpoint)
    if best is None or best.parent.resolve() == folder.resolve() or (folder / best.name).is_dir():
        return
    incoming = folder / INCOMING / best.name
    shutil.copytree(best, incoming)
    sync_tree(incoming)
    replace(incoming, folder / best.name)


def publish(written: Path, root: Path) -> Path:
    """Seal a checkpoint, flush it to disk, and publish it by one rename."""
    seal(written)
    sync_tree(written)
    checkpoint = root / written.name
    discard(checkpoint)  # a damaged one of the same step
    replace(written, checkpoint)
    return checkpoint


def prune(root: Path, limit: int | None, best_step: int | None) -> None:
    """Remove all but the newest `limit` checkpoints and the best one; None keeps all."""
    found = sorted(root.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found[:-limit] if limit else []:
        if path.name != f"checkpoint-{best_step}":
            discard(path)


def seal(folder: Path) -> None:
    """Write the hash of every file, subfolders included, so that damage is detected."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _FILES)
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
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


def _fault_of_best(folder: Path) -> str | None:
    """The fault of the best checkpoint, which a run that publishes its best step needs too."""
    best = _best_of(folder)
    if best is None or best.name == folder.name:
        return None
    fault = _fault(best)
    return None if fault is None else f"its best step {best.name}: {fault}"


def _best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint by a checkpoint's state, in the same folder."""
    state = checkpoint / STATE_FILE
    best = json.loads(state.read_text(encoding="utf-8"))["best_step"] if state.is_file() else None
    return None if best is None else checkpoint.parent / f"checkpoint-{best}"
