"""Run records: `runs/<run id>/{record.json,replay.yml,conf/}`, written early and renamed into place at every change."""

from __future__ import annotations

import datetime as dt
import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.record_schema import FORMAT, Outcome, fault_of_record
from qwen_vl_lora.runs.run import Artifact, Run, RunInterruptedError
from qwen_vl_lora.runs.storage import Lock, make_folder, sync_folder, sync_tree, temporary, write_whole

logger = logging.getLogger(__name__)

RECORD_FILE = "record.json"
REPLAY_FILE = "replay.yml"
CONFIGURATION = "conf"
REPORTING = "data/08_reporting"

_LOCK = ".lock"


@dataclass(frozen=True)
class Record:
    """The record of one run on disk.

    Attributes:
        folder: `runs/<run id>`.
        facts: the content of `record.json`.
    """

    folder: Path
    facts: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.facts["id"])

    @property
    def sequence(self) -> int:
        """Order in which the runs of the recipe began, independent of the clock."""
        return int(self.facts.get("sequence", 0))

    @property
    def order(self) -> int:
        """Order over all recipes of the project; 0 in records of earlier versions."""
        return int(self.facts.get("order", 0))

    @property
    def making(self) -> tuple[int, int, str]:
        """Sort key for the order in which the runs of one recipe began."""
        return self.order, self.sequence, self.id

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
        """How the run ended. A killed process cannot record its own end, so the lock is checked."""
        outcome: Outcome = self.facts["outcome"]
        return outcome if outcome != "running" or self.is_under_way else "interrupted"

    @property
    def is_under_way(self) -> bool:
        return self.facts["outcome"] == "running" and Lock.is_held(self.folder / _LOCK)

    def complete_versions(self) -> dict[str, str]:
        """Return dataset → version of what the run wrote in pipelines that it completed."""
        stages = self.facts.get("stages", {})
        written = self.written
        unfinished = {name for outputs in stages.values() if not set(outputs) <= set(written) for name in outputs}
        return {
            name: artifact["version"]
            for name, artifact in written.items()
            if artifact.get("version") and name not in unfinished
        }

    def read_versions(self) -> dict[str, str]:
        """Return dataset → version of what the run loaded."""
        return {name: artifact["version"] for name, artifact in self.read.items() if artifact.get("version")}


def runs_folder(project: Path, recipe: str) -> Path:
    """Return the folder of a recipe's run records."""
    return project / REPORTING / recipe / "runs"


def is_of_project(folder: Path, project: Path) -> bool:
    """Whether a run folder is among the project's own runs."""
    runs = folder.resolve().parent
    return runs.name == "runs" and runs.parent.parent == (project / REPORTING).resolve()


def read_record(folder: Path) -> Record:
    """Read the record in a run folder.

    Raises:
        MissingArtifactError: if there is none.
        DataFormatError: if it is not a run record.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise MissingArtifactError(f"Run record not found: {path}.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataFormatError(f"{path} is not a run record: {str(error) or type(error).__name__}.") from error
    if fault := fault_of_record(facts):
        raise DataFormatError(f"{path} is not a run record: {fault}.")
    for name in ("parameters", "runtime_params"):
        if isinstance(facts.get(name), dict):
            facts[name] = in_todays_names(facts[name])
    return Record(folder, facts)


def in_todays_names(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters that an older version may have recorded, by the names that they have now."""
    named = dict(parameters)
    old = named.pop("launcher", None)
    if not isinstance(old, Mapping):
        return dict(parameters)
    each, machines = old.get("nproc_per_node", 1), old.get("nnodes", 1)
    new = {"processes": each if each == "auto" else each * machines, "gpus_per_process": 1}
    new["address"] = None if machines == 1 else "auto"
    return {"cluster": {**new, "timeout": old.get("timeout", 1800)}, **named}


def read_records(folder: Path) -> list[Record]:
    """Read all records below `runs/`, oldest first. Unreadable ones are reported and skipped."""
    records = []
    for path in sorted(folder.glob(f"[!.]*/{RECORD_FILE}")):  # hidden folders are not finished yet
        try:
            records.append(read_record(path.parent))
        except (MissingArtifactError, DataFormatError) as error:
            logger.warning("%s Skipped.", error)
    return sorted(records, key=lambda record: record.making)


def all_records(project: Path) -> list[Record]:
    """Read the records of all recipes, oldest first.

    Records of earlier versions have no `order`; between recipes they are ordered by the clock.
    """
    return _records_below(project / REPORTING)


def _records_below(reporting: Path) -> list[Record]:
    keyed = []
    for folder in sorted(reporting.glob("*/runs")):
        latest = ""
        for number, record in enumerate(read_records(folder)):
            latest = max(latest, record.id)
            keyed.append(((record.order, latest, number), record))
    return [record for _, record in sorted(keyed, key=lambda pair: pair[0])]


def is_replay(run: Run | None, project: Path) -> bool:
    """Whether a run repeats a recorded one: its configuration lies beside that one's record."""
    source = None if run is None else run.facts.get("configuration")
    return source is not None and (project / source).with_name(RECORD_FILE).is_file()


def find_record(project: Path, run: str, serves: Callable[[Record], bool] = lambda _: True) -> Record:
    """Find a run by its id, by its folder, or as `latest`.

    Args:
        serves: whether a run can be what `latest` means.

    Raises:
        MissingArtifactError: naming the newest runs.
    """
    if (Path(run) / RECORD_FILE).is_file():
        return read_record(Path(run))
    records = all_records(project)
    if run == "latest":
        found = [record for record in records if serves(record)][-1:]
    else:
        found = [record for record in records if record.id == run]
    if not found:
        known = ", ".join(f"{record.id} ({record.outcome})" for record in records[-5:]) or "none"
        raise MissingArtifactError(f"Run not found: {run}. Newest runs: {known}. `qwen-vl-lora runs` lists all.")
    return found[0]


def runs_around(path: Path) -> list[Path]:
    """Where each recipe's runs are recorded, of the project that holds `path`; of the current one where none does."""
    for folder in (*path.absolute().parents, Path.cwd(), *Path.cwd().parents):
        if (folder / REPORTING).is_dir():
            return sorted((folder / REPORTING).glob("*/runs"))
    return []


def sorted_by_making(versions: Iterable[str], runs: Sequence[Path]) -> list[str]:
    """Versions of a dataset, the newest first, by the order in which the runs recorded in `runs` made them.

    A version that no record names (saved in a notebook, say) follows the recorded version that precedes it by name.
    """
    names = sorted(versions)
    orders = {name: [_making_of(folder / name) for folder in runs] for name in names}
    made = {name: max(found) for name, given in orders.items() if (found := [order for order in given if order])}
    key, newest = {}, (0, 0, "")
    for name in names:
        newest = max(newest, made.get(name, newest))
        key[name] = (made[name], "") if name in made else (newest, name)
    return sorted(names, key=lambda name: key[name], reverse=True)


def _making_of(folder: Path) -> tuple[int, int, str] | None:
    try:
        facts = (folder / RECORD_FILE).stat()
        return _read_making(folder, facts.st_mtime_ns, facts.st_size)
    except (OSError, MissingArtifactError, DataFormatError):
        return None


@functools.lru_cache(maxsize=4096)
def _read_making(folder: Path, _changed: int, _size: int) -> tuple[int, int, str]:
    return read_record(folder).making


class RecordWriter:
    """Keeps the current run's record on disk.

    Failure to write the record, on a full disk say, neither stops the run nor hides its own errors.

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
        """Create the folder with the run's configuration by one rename, and record the run as `running`.

        Args:
            configuration: file name relative to the folder → text, `replay.yml` among them.
        """
        others = _records_below(self.folder.parents[2])
        earlier = [record for record in others if record.folder.parent == self.folder.parent]
        self._run.facts["order"] = 1 + max((record.order for record in others), default=0)
        self._run.facts["sequence"] = 1 + max((record.sequence for record in earlier), default=0)
        self._run.facts["started"] = now()
        staging = temporary(self.folder)
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
                f"Run {self.folder.name} already exists: another run began in the same millisecond. Nothing was "
                "done; repeat the command."
            ) from error
        sync_folder(self.folder.parent)

    def update(self) -> None:
        """Write the facts known so far."""
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
            logger.warning("Cannot write the run record %s: %s.", self.folder / RECORD_FILE, error)

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
    """Return the UTC time with milliseconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
