"""Checkpoints of one training job: whole or absent, found again by the same command.

`<workspace>/training/<fingerprint>/inputs.json` says what the job is: its parts and their hashes.
`<workspace>/training/<fingerprint>/checkpoint-<step>/` holds adapter, optimizer, scheduler, RNG, state, files.json.
`<workspace>/training/<fingerprint>/parent.txt` names the adapter that `init_adapter` chose.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import MissingArtifactError, TrainingError
from qwen_vl_lora.lineage.comparison import differing_settings
from qwen_vl_lora.lineage.run import at_run_end, current_run
from qwen_vl_lora.lineage.storage import Lock, discard, leftovers, replace, sync_tree, write_whole
from qwen_vl_lora.modeling.base_model import digest
from qwen_vl_lora.modeling.fingerprints import file_sha256

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_FILES = "files.json"
_INPUTS = "inputs.json"
_STATE = "trainer_state.json"
INCOMING = ".incoming"
LOCK_FILE = ".lock"
PARENT_FILE = "parent.txt"


@dataclass
class TrainingJob:
    """A training run's identity, and the folder where it keeps what it has so far.

    A second process that trains the very same thing at the same time gets a folder of its own.

    Attributes:
        inputs: name → hash or value of everything that decides the result.
        parent: place of the adapter that it goes on from, which must stay as long as the job may be gone on with.
        root: folder of all jobs of the recipe.
        folder: this job's own, final after `open`.
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
        """Take the folder, clean up what a kill left in it, and note what the job is."""
        self.folder = next(folder for folder in self._folders() if _take(folder))
        at_run_end(self._leave)
        for path in [*leftovers(self.folder), self.folder / INCOMING]:
            shutil.rmtree(path, ignore_errors=True)
        write_whole(self.folder / _INPUTS, json.dumps(dict(self.inputs), indent=2, sort_keys=True))
        if self.parent is not None:
            write_whole(self.folder / PARENT_FILE, self.parent)

    def close(self) -> None:
        """Forget the checkpoints when the run that trains has finished: a finished run never resumes.

        Until then they stay. A run that dies before all its artifacts are saved goes on from the last one.
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
        """The newest checkpoint whose every file is what it was when written. Damaged newer ones are removed."""
        for path in reversed(self.checkpoints()):
            fault = _fault(path) or _fault_of_best(path)
            if fault is None:
                return path
            logger.warning("Checkpoint %s is damaged (%s); falling back to the one before.", path, fault)
            discard(path)
        return None

    def other_unfinished(self) -> list[str]:
        """For the newest unfinished job with other inputs: the names that differ."""
        others = [path for path in self.root.glob(f"*/{_INPUTS}") if not path.parent.name.startswith(self._name)]
        others = [path for path in others if any(path.parent.glob("checkpoint-*"))]
        if not others:
            return []
        newest = max(others, key=lambda path: path.stat().st_mtime)
        return differing(json.loads(newest.read_text(encoding="utf-8")), self.inputs)


_taken: dict[Path, Lock] = {}
"""Job folders of this process. A training that failed in a notebook may be tried again there."""


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
    """Where training goes on, or None to start afresh.

    Args:
        resume: `auto`, `never`, or the path of a checkpoint of the very same job.

    Raises:
        MissingArtifactError: if a named checkpoint is not there.
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
    fault = _fault(path) or _fault_of_best(path)
    if fault is not None:
        raise TrainingError(f"resume names {path}, which is damaged: {fault}. Name another one, or use auto.")
    _bring_best(path, job.folder)
    return path


def _bring_best(checkpoint: Path, folder: Path) -> None:
    """Copy the best step of a training that began in another folder: that is what may be published."""
    best = _best_of(checkpoint)
    if best is None or best.parent.resolve() == folder.resolve() or (folder / best.name).is_dir():
        return
    incoming = folder / INCOMING / best.name
    shutil.copytree(best, incoming)
    sync_tree(incoming)
    replace(incoming, folder / best.name)


def publish(written: Path, root: Path) -> Path:
    """Seal a checkpoint, bring it to the disk, and make it visible by one rename."""
    seal(written)
    sync_tree(written)
    checkpoint = root / written.name
    discard(checkpoint)  # a damaged one of the same step
    replace(written, checkpoint)
    return checkpoint


def prune(root: Path, limit: int | None, best: str | None) -> None:
    """Remove all but the newest `limit` checkpoints and the best one; None keeps all."""
    found = sorted(root.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found[:-limit] if limit else []:
        if str(path) != best:
            discard(path)


def seal(folder: Path) -> None:
    """Note every file's hash, those in its folders too, so that a damaged checkpoint is told from a whole one."""
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
    """A run that publishes its best step needs that checkpoint too."""
    best = _best_of(folder)
    if best is None or best.name == folder.name:
        return None
    fault = _fault(best)
    return None if fault is None else f"its best step {best.name}: {fault}"


def _best_of(checkpoint: Path) -> Path | None:
    """The best checkpoint that a checkpoint's state names, beside it."""
    state = checkpoint / _STATE
    best = json.loads(state.read_text(encoding="utf-8")).get("best_model_checkpoint") if state.is_file() else None
    return None if best is None else checkpoint.parent / Path(best).name
