"""What may go: old versions, checkpoints and stored features that no kept run needs.

Works on what run records say the runs wrote. A version that no record knows is left alone.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
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
    return [record.id for record in _records_under_way(project, recipe)]


def _records_under_way(project: Path, recipe: str) -> list[Record]:
    return [record for record in read_records(runs_folder(project, recipe)) if record.is_under_way]


def plan_removals(project: Path, recipe: str, keep_adapters: int, keep_runs: Sequence[str]) -> list[Removal]:
    """What may go of one recipe.

    Kept are the newest adapters with everything that their records name, the runs that are named, what was
    measured with either, and the newest complete version of every dataset.

    Args:
        keep_adapters: how many of the newest adapters stay.
        keep_runs: ids of runs whose versions stay as well.

    Raises:
        MissingArtifactError: if no run of the recipe is recorded: nobody knows then what is needed.
        DataFormatError: if the record of an adapter that stays cannot be read, for the same reason.
    """
    records = read_records(runs_folder(project, recipe))
    if not records:
        raise MissingArtifactError(
            f"No run of recipe {recipe!r} is recorded, so what is needed is unknown and nothing is removed. "
            f"Recipes with runs: {', '.join(recipes(project)) or 'none'}."
        )
    kept_records = _kept_records(records, keep_adapters, keep_runs)
    kept = _kept_versions(kept_records, records)
    places = _read_by_others(project, recipe) | _parents_of_unfinished(project)
    while True:  # an adapter that stays for another's sake makes what it names stay too
        removals = list(_old_versions(project, recipe, records, kept, places))
        going = {removal.path for removal in removals}
        named = NamedByAdapters.that_stay(project, going)
        if named.places <= places:
            break
        places |= named.places
    removals += _pictures(project, recipe, going)
    removals += _features(project, recipe, _feature_keys(kept_records) | named.feature_keys)
    removals += _checkpoints(project, recipe)
    removals += _killed_saves(project, recipe)
    return removals


@dataclass(frozen=True)
class NamedByAdapters:
    """What the adapters' own records name, whatever run records say or lack.

    Attributes:
        places: files and folders that were read, the base model and the adapter that one went on from among them.
        feature_keys: keys of stored features.
    """

    places: set[Path]
    feature_keys: set[str]

    @classmethod
    def that_stay(cls, project: Path, going: set[Path]) -> NamedByAdapters:
        """Of all adapters of all recipes but those that go: an adapter may have been trained on another recipe's."""
        places: set[Path] = set()
        keys: set[str] = set()
        for file in (project / "data").glob("*/*/adapter/*/adapter/adapter_record.json"):
            if file.parents[1] in going:
                continue
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                read = record.get("run", {}).get("read", {})
                paths = [artifact["path"] for artifact in read.values() if artifact.get("path")]
                paths += [record["parent"]["path"]] if record.get("parent") else []
            except (ValueError, AttributeError) as error:
                raise DataFormatError(
                    f"{file} cannot be read ({error}), so what its adapter needs is unknown and nothing is removed. "
                    "Mend it, or remove that adapter's version yourself."
                ) from error
            base = record.get("base_model", {}).get("name")
            places |= {project / path for path in [*paths, *([base] if base else [])]}
            keys |= set(read.get("image_features", {}).get("keys", ()))
        return cls(places, keys)


def _read_by_others(project: Path, recipe: str) -> set[Path]:
    """What runs of other recipes that are under way have read so far."""
    others = [record for name in recipes(project) if name != recipe for record in _records_under_way(project, name)]
    return {project / artifact["path"] for record in others for artifact in record.read.values() if "path" in artifact}


def _parents_of_unfinished(project: Path) -> set[Path]:
    """Adapters that trainings which can be gone on with started from, in any recipe."""
    jobs = [job for name in recipes(project) for job in _unfinished_trainings(project, name)]
    notes = [job / "parent.txt" for job in jobs if (job / "parent.txt").is_file()]
    return {project / note.read_text(encoding="utf-8") for note in notes}


def _unfinished_trainings(project: Path, recipe: str) -> list[Path]:
    """Training folders that stay: the newest that can be gone on with, and those in use."""
    jobs = _trainings(project, recipe)
    newest = [folder for folder in jobs if any(folder.glob("checkpoint-*"))][-1:]
    return [folder for folder in jobs if folder in newest or Lock.is_held(folder / ".lock")]


def _trainings(project: Path, recipe: str) -> list[Path]:
    """Training folders, by the time of their last start."""
    notes = (project / "data/09_workspace" / recipe / "training").glob("*/inputs.json")
    return [note.parent for note in sorted(notes, key=lambda note: note.stat().st_mtime)]


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


def _old_versions(
    project: Path, recipe: str, records: Sequence[Record], kept: Kept, places: set[Path]
) -> Iterator[Removal]:
    """Versions that are not kept and hold none of the `places`."""
    for record in records:
        for name, artifact in record.written.items():
            if artifact.get("version") and (name, artifact["version"]) not in kept:
                folder = version_folder(project, recipe, artifact)
                if folder is not None and not any(place.is_relative_to(folder) for place in places):
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
    named = {name for manifest in manifests for name in _picture_files(manifest)}
    for file in sorted((root / "files").glob("*")):
        if file.is_file() and file.name not in named:
            yield Removal(file, "picture that no kept version of images holds", file.stat().st_size)


def _picture_files(manifest: Path) -> Iterator[str]:
    with manifest.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield PurePosixPath(row["path"]).name


def _features(project: Path, recipe: str, used: set[str]) -> Iterator[Removal]:
    """Stored features of keys that nothing kept used. They are remade whenever they are missing."""
    for file in sorted((project / "data/04_feature" / recipe / "image_features").glob("*/key.json")):
        if file.parent.name not in used:
            yield Removal(file.parent, "stored features that no kept run used", size(file.parent))


def _feature_keys(kept_records: Sequence[Record]) -> set[str]:
    return {
        key
        for record in kept_records
        for artifacts in (record.read, record.written)
        for key in artifacts.get("image_features", {}).get("keys", ())
    }


def _checkpoints(project: Path, recipe: str) -> Iterator[Removal]:
    """Training folders, but for the newest that can be gone on with and those in use."""
    staying = _unfinished_trainings(project, recipe)
    for folder in _trainings(project, recipe):
        if folder not in staying:
            yield Removal(folder, "checkpoints of a training that ended or was given up", size(folder))


def _killed_saves(project: Path, recipe: str) -> Iterator[Removal]:
    for layer in sorted((project / "data").glob("*")):
        for folder, subfolders, _ in os.walk(layer / recipe):
            for path in leftovers(Path(folder)):
                yield Removal(path, "left by a killed save", size(path))
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "files"]
