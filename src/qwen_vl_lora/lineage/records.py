"""Run records: `runs/<run id>/{record.json,replay.yml,conf/}`, written early and renamed into place at every change."""

from __future__ import annotations

import datetime as dt
import json
import logging
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.lineage.run import Artifact, Run, RunInterruptedError
from qwen_vl_lora.lineage.storage import Lock, make_folder, sync_folder, sync_tree, write_whole

logger = logging.getLogger(__name__)

RECORD_FILE = "record.json"
REPLAY_FILE = "replay.yml"
CONFIGURATION = "conf"
FORMAT = 1
REPORTING = "data/08_reporting"

_LOCK = ".lock"

Outcome = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Record:
    """One run as it is on disk.

    Attributes:
        folder: `runs/<run id>`.
        facts: content of `record.json`.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.facts["id"])

    @property
    def sequence(self) -> int:
        """Order in which the runs began, whatever the clock said."""
        return int(self.facts.get("sequence", 0))

    @property
    def recipe(self) -> str:
        return str(self.facts["recipe"])

    @property
    def read(self) -> dict[str, Artifact]:
        return dict(self.facts["datasets"]["read"])

    @property
    def written(self) -> dict[str, Artifact]:
        return dict(self.facts["datasets"]["written"])

    @property
    def outcome(self) -> Outcome:
        """How the run ended. One whose process was killed could not say so itself."""
        outcome: Outcome = self.facts["outcome"]
        return outcome if outcome != "running" or self.is_under_way else "interrupted"

    @property
    def is_under_way(self) -> bool:
        return self.facts["outcome"] == "running" and Lock.is_held(self.folder / _LOCK)

    def complete_versions(self) -> dict[str, str]:
        """Dataset → version of what the run wrote in stages that it went through to their end."""
        stages = self.facts.get("stages", {})
        written = self.written
        unfinished = {name for outputs in stages.values() if not set(outputs) <= set(written) for name in outputs}
        return {
            name: artifact["version"]
            for name, artifact in written.items()
            if artifact.get("version") and name not in unfinished
        }

    def read_versions(self) -> dict[str, str]:
        """Dataset → version of what the run loaded."""
        return {name: artifact["version"] for name, artifact in self.read.items() if artifact.get("version")}


def runs_folder(project: Path, recipe: str) -> Path:
    """Where the records of a recipe's runs lie."""
    return project / REPORTING / recipe / "runs"


def read_record(folder: Path) -> Record:
    """The record in one run's folder.

    Raises:
        MissingArtifactError: if there is none.
        DataFormatError: if it is not one.
    """
    path = folder / RECORD_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or not {"id", "recipe", "outcome", "datasets"} <= facts.keys():
            raise ValueError("it lacks id, recipe, outcome or datasets")
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')}, this version reads {FORMAT}")
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{path} is not there, so what this run did is unknown.") from error
    except ValueError as error:
        raise DataFormatError(f"{path} is no run record: {error}.") from error
    return Record(folder, facts)


def read_records(folder: Path) -> list[Record]:
    """All records below `runs/`, oldest first. One that cannot be read is named and left out."""
    records = []
    for path in sorted(folder.glob(f"*/{RECORD_FILE}")):
        try:
            records.append(read_record(path.parent))
        except (MissingArtifactError, DataFormatError) as error:
            logger.warning("%s It is left out.", error)
    return sorted(records, key=lambda record: (record.sequence, record.id))


def find_record(project: Path, run: str) -> Record:
    """A run by its id, by its folder, or `latest`.

    Raises:
        MissingArtifactError: naming the newest runs there are.
    """
    if (Path(run) / RECORD_FILE).is_file():
        return read_record(Path(run))
    folders = sorted((project / REPORTING).glob("*/runs"))
    by_recipe = [records for folder in folders if (records := read_records(folder))]
    if run == "latest":  # in a recipe by sequence; between recipes only the clock can tell
        found = sorted((records[-1] for records in by_recipe), key=lambda record: record.id)[-1:]
    else:
        found = [record for records in by_recipe for record in records if record.id == run]
    if not found:
        known = ", ".join(sorted(record.id for records in by_recipe for record in records)[-5:]) or "none"
        raise MissingArtifactError(f"There is no run {run}. The newest: {known}. `qwen-vl-lora runs` lists all.")
    return found[0]


class RecordWriter:
    """Keeps the current run's record on disk.

    A record that can no longer be written, on a full disk say, never stops or hides what the run itself does.

    Args:
        folder: `runs/<run id>`; made by `open`.
        run: the run, whose facts, reads and writes are written.
    """

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self._run = run
        self._lock: Lock | None = None

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def open(self, configuration: Mapping[str, str]) -> None:
        """Make the folder with the run's configuration, whole, and say that the run is under way.

        Args:
            configuration: file name relative to the folder → text, `replay.yml` among them.
        """
        earlier = read_records(self.folder.parent)
        self._run.facts["sequence"] = 1 + max((record.sequence for record in earlier), default=0)
        self._run.facts["started"] = now()
        staging = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}.partial")
        lock = Lock(staging / _LOCK)
        try:
            make_folder(staging)
            lock.acquire()
            for name, text in {**configuration, RECORD_FILE: self._text("running")}.items():
                path = staging / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            sync_tree(staging)
            self._publish(staging)
        except BaseException:
            lock.release()
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self._lock = lock

    def _publish(self, staging: Path) -> None:
        try:
            staging.rename(self.folder)
        except OSError as error:
            if not self.folder.exists():
                raise
            raise RunInterruptedError(
                f"Run {self.folder.name} is there already: another one began in the same millisecond. Nothing was "
                "done; give the same command again."
            ) from error
        sync_folder(self.folder.parent)

    def update(self) -> None:
        """Write what is known so far."""
        self._write("running", sync=False)

    def close(self, outcome: Outcome, message: str | None = None) -> None:
        """Write how the run ended."""
        self._run.facts |= {"ended": now(), "message": message}
        self._write(outcome, sync=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(self, outcome: Outcome, *, sync: bool) -> None:
        try:
            write_whole(self.folder / RECORD_FILE, self._text(outcome), sync=sync)
        except OSError as error:
            logger.warning("The run record %s could not be written: %s.", self.folder / RECORD_FILE, error)

    def _text(self, outcome: Outcome) -> str:
        run = self._run
        record = {
            "format": FORMAT,
            "id": run.id,
            "outcome": outcome,
            **run.facts,
            "datasets": {"read": run.read, "written": run.written},
        }
        return json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n"


def now() -> str:
    """UTC time with milliseconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
