"""What may go: old versions, checkpoints and stored features that no kept run needs.

Works on what run records say the runs wrote. A version that no record knows is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_vl_lora.lineage.consistency import versions_behind
from qwen_vl_lora.lineage.records import Record, read_records, runs_folder
from qwen_vl_lora.lineage.run import Artifact
from qwen_vl_lora.lineage.storage import Lock, discard, leftovers, size

Kept = set[tuple[str, str]]
"""(dataset, version)"""


@dataclass(frozen=True)
class Removal:
    """One file or folder that may go.

    Attributes:
        reason: what it is, for the list that is shown first.
    """

    path: Path
    reason: str
    bytes: int

    def carry_out(self) -> None:
        if self.path.is_dir():
            discard(self.path)
        else:
            self.path.unlink(missing_ok=True)


def recipes(project: Path) -> list[str]:
    """Recipes that have run records."""
    return sorted(path.parent.name for path in (project / "data/08_reporting").glob("*/runs"))


def runs_under_way(project: Path, recipe: str) -> list[str]:
    """Ids of runs whose process lives."""
    return [record.id for record in read_records(runs_folder(project, recipe)) if record.is_under_way]


def plan_removals(project: Path, recipe: str, keep_adapters: int, keep_runs: Sequence[str]) -> list[Removal]:
    """What may go of one recipe.

    Kept are the newest adapters with everything that their records name, the runs that are named, what was
    measured with either, and the newest complete version of every dataset.

    Args:
        keep_adapters: how many of the newest adapters stay.
        keep_runs: ids of runs whose versions stay as well.
    """
    records = read_records(runs_folder(project, recipe))
    kept_records = _kept_records(records, keep_adapters, keep_runs)
    kept = _kept_versions(kept_records, records) | _named_by_adapters(project, kept_records)
    removals = list(_old_versions(project, recipe, records, kept))
    going = {removal.path for removal in removals}
    removals += _pictures(project, recipe, going)
    removals += _features(project, recipe, kept_records)
    removals += _checkpoints(project, recipe)
    removals += _killed_saves(project, recipe)
    return removals


def _kept_records(records: Sequence[Record], keep_adapters: int, keep_runs: Sequence[str]) -> list[Record]:
    trained = [record for record in records if "adapter" in record.written]
    kept = [record for record in records if record in trained[-keep_adapters:] or record.id in keep_runs]
    adapters = {record.written["adapter"]["version"] for record in kept if "adapter" in record.written}
    measured = [record for record in records if record.read.get("adapter", {}).get("version") in adapters]
    newest = {name: record for record in records for name in record.complete_versions()}
    return [record for record in records if record in [*kept, *measured, *newest.values()]]


def _kept_versions(kept_records: Sequence[Record], records: Sequence[Record]) -> Kept:
    kept: Kept = set()
    for record in kept_records:
        named = {**record.read_versions(), **versions_behind(record, records)}
        written = {name: a["version"] for name, a in record.written.items() if a.get("version")}
        kept |= {*named.items(), *record.read_versions().items(), *written.items()}
    return kept


def _named_by_adapters(project: Path, kept_records: Sequence[Record]) -> Kept:
    """What the kept adapters' own records name, whatever the run records say."""
    kept: Kept = set()
    for record in kept_records:
        artifact = record.written.get("adapter")
        file = project / artifact["path"] / "adapter_record.json" if artifact else None
        if file is not None and file.is_file():
            read = json.loads(file.read_text(encoding="utf-8")).get("run", {}).get("read", {})
            kept |= {(name, named["version"]) for name, named in read.items() if named["version"]}
    return kept


def _old_versions(project: Path, recipe: str, records: Sequence[Record], kept: Kept) -> Iterator[Removal]:
    for record in records:
        for name, artifact in record.written.items():
            if artifact.get("version") and (name, artifact["version"]) not in kept:
                folder = version_folder(project, recipe, artifact)
                if folder is not None:
                    yield Removal(folder, f"{name} {artifact['version']}", size(folder))


def version_folder(project: Path, recipe: str, artifact: Artifact) -> Path | None:
    """The folder of a version, if it is one: `data/<layer>/<recipe>/…/<name>/<version>/<name>`.

    Records may have been copied here from elsewhere: a path that leads anywhere else is not followed.
    """
    path = PurePosixPath(artifact["path"])
    in_place = len(path.parts) >= 6 and path.parts[0] == "data" and path.parts[2] == recipe and ".." not in path.parts
    if not in_place or path.parent.name != artifact["version"] or path.parent.parent.name != path.name:
        return None
    folder = project / path.parent
    is_here = folder.is_dir() and folder.resolve().is_relative_to((project / "data").resolve())
    return folder if is_here else None


def _pictures(project: Path, recipe: str, going: set[Path]) -> Iterator[Removal]:
    """Bytes that no manifest that stays names."""
    root = project / "data/02_intermediate" / recipe / "images"
    manifests = [path for path in root.glob("manifest.csv/*/manifest.csv") if path.parent not in going]
    if not manifests:
        return
    lines = [line for path in manifests for line in path.read_text(encoding="utf-8").splitlines()]
    named = {line.split("/files/")[-1].split(",")[0] for line in lines}
    for file in sorted((root / "files").glob("*")):
        if file.is_file() and file.name not in named:
            yield Removal(file, "picture that no kept version of images holds", file.stat().st_size)


def _features(project: Path, recipe: str, kept_records: Sequence[Record]) -> Iterator[Removal]:
    """Stored features of keys that no kept run used. They are remade whenever they are missing."""
    used = {
        artifact["key"]
        for record in kept_records
        for artifact in (record.read.get("image_features"), record.written.get("image_features"))
        if artifact and artifact.get("key")
    }
    for file in sorted((project / "data/04_feature" / recipe / "image_features").glob("*/key.json")):
        if file.parent.name not in used:
            yield Removal(file.parent, "stored features that no kept run used", size(file.parent))


def _checkpoints(project: Path, recipe: str) -> Iterator[Removal]:
    """Training folders, but for the newest that can be gone on with and those in use."""
    jobs = sorted(
        (path.parent for path in (project / "data/09_workspace" / recipe / "training").glob("*/inputs.json")),
        key=lambda folder: (folder / "inputs.json").stat().st_mtime,
    )
    unfinished = [folder for folder in jobs if any(folder.glob("checkpoint-*"))]
    for folder in jobs:
        if folder not in unfinished[-1:] and not Lock.is_held(folder / ".lock"):
            yield Removal(folder, "checkpoints of a training that ended or was given up", size(folder))


def _killed_saves(project: Path, recipe: str) -> Iterator[Removal]:
    for layer in sorted((project / "data").glob("*")):
        for folder, subfolders, _ in os.walk(layer / recipe):
            for path in leftovers(Path(folder)):
                yield Removal(path, "left by a killed save", size(path))
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "files"]
