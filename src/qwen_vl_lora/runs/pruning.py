"""Selects what may be removed: old versions, checkpoints, stored features and captions that no kept run needs.

The selection uses the run records. A version that no record names is kept.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.runs.consistency import versions_behind
from qwen_vl_lora.runs.records import REPORTING, Record, read_records, runs_folder
from qwen_vl_lora.runs.run import Artifact
from qwen_vl_lora.runs.storage import Lock, discard, leftovers, size

Kept = set[tuple[str, str]]
"""(dataset, version)"""

Places = Mapping[str, Path]
"""Dataset → the path that the catalog of its recipe gives it."""


@dataclass(frozen=True)
class Removal:
    """One file or folder that may be removed.

    Attributes:
        reason: what it is, for the list shown to the user.
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
    return sorted(path.parent.name for path in (project / REPORTING).glob("*/runs"))


def runs_under_way(project: Path, recipe: str) -> list[str]:
    """Return the ids of runs whose process is alive."""
    return [record.id for record in _records_under_way(project, recipe)]


def _records_under_way(project: Path, recipe: str) -> list[Record]:
    return [record for record in read_records(runs_folder(project, recipe)) if record.is_under_way]


def plan_removals(
    project: Path, recipe: str, all_places: Mapping[str, Places], keep_adapters: int, keep_runs: Sequence[str]
) -> list[Removal]:
    """What may go of one recipe.

    Kept are the newest adapters with everything that their records name, the named runs, what was
    measured with either, and the newest complete version of every dataset.

    Args:
        all_places: of every recipe that has run records.
        keep_adapters: how many of the newest adapters stay.
        keep_runs: ids of runs whose versions stay as well.

    Raises:
        MissingArtifactError: if no run of the recipe is recorded, so what is needed is unknown.
        DataFormatError: if the record of a kept adapter cannot be read, for the same reason.
    """
    records = read_records(runs_folder(project, recipe))
    if not records:
        raise MissingArtifactError(
            f"No run of recipe {recipe!r} is recorded, so what is needed is unknown and nothing is removed. "
            f"Recipes with runs: {', '.join(recipes(project)) or 'none'}."
        )
    kept_records = _kept_records(records, keep_adapters, keep_runs)
    kept = _kept_versions(kept_records, records)
    places = all_places[recipe]
    needed = _read_by_others(project, recipe) | _parents_of_unfinished(project, all_places)
    while True:  # an adapter that stays for another's sake makes what it names stay too
        removals = list(_old_versions(project, recipe, places, records, kept, needed))
        going = {removal.path for removal in removals}
        named = NamedByAdapters.that_stay(project, [each["adapter"] for each in all_places.values()], going)
        if named.places <= needed:
            break
        needed |= named.places
    removals += _pictures(places["images"], going)
    removals += _features(places["image_features"], _feature_keys(kept_records) | named.feature_keys)
    removals += _tokenised(places["workspace"], kept_records)
    removals += _checkpoints(places["workspace"])
    removals += _killed_export(places["workspace"])
    removals += _captions(places["workspace"], kept_records)
    removals += _killed_saves(project, recipe, places)
    return removals


@dataclass(frozen=True)
class NamedByAdapters:
    """What the adapters' own records name, independent of run records.

    Attributes:
        places: files and folders that were read, including the base model and an initial adapter.
        feature_keys: keys of stored features.
    """

    places: set[Path]
    feature_keys: set[str]

    @classmethod
    def that_stay(cls, project: Path, adapters: Sequence[Path], going: set[Path]) -> NamedByAdapters:
        """Of all adapters but those that go: an adapter may have been trained on another recipe's data.

        Args:
            adapters: where the recipes keep theirs; looked at beside every place of the usual kind.
        """
        places: set[Path] = set()
        keys: set[str] = set()
        usual = (project / "data").glob("*/*/adapter")
        for file in (file for folder in {*adapters, *usual} for file in folder.glob("*/adapter/adapter_record.json")):
            if file.parents[1] in going:
                continue
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
                read = record.get("run", {}).get("read", {})
                paths = [artifact["path"] for artifact in read.values() if artifact.get("path")]
                paths += [record["parent"]["path"]] if record.get("parent") else []
                base = record.get("base_model", {}).get("name")
                places |= {project / path for path in [*paths, *([base] if base else [])]}
                keys |= set(read.get("image_features", {}).get("keys", ()))
            except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
                raise DataFormatError(
                    f"{file} cannot be read ({error}), so what its adapter needs is unknown and nothing is removed. "
                    "Repair it, or remove that version of the adapter yourself."
                ) from error
        return cls(places, keys)


def _read_by_others(project: Path, recipe: str) -> set[Path]:
    """Return what unfinished runs of other recipes have read so far."""
    others = [record for name in recipes(project) if name != recipe for record in _records_under_way(project, name)]
    read = [artifact.get("path") for record in others for artifact in record.read.values()]
    return {project / path for path in read if path}


def _parents_of_unfinished(project: Path, all_places: Mapping[str, Places]) -> set[Path]:
    """Adapters that trainings which can be gone on with started from, in any recipe."""
    jobs = [job for places in all_places.values() for job in _unfinished_trainings(places["workspace"])]
    notes = [job / "parent.txt" for job in jobs if (job / "parent.txt").is_file()]
    return {project / note.read_text(encoding="utf-8") for note in notes}


def _unfinished_trainings(workspace: Path) -> list[Path]:
    """Training folders that stay: the newest that can be gone on with, and those in use."""
    jobs = _trainings(workspace)
    newest = [folder for folder in jobs if any(folder.glob("checkpoint-*"))][-1:]
    return [folder for folder in jobs if folder in newest or Lock.is_held(folder / ".lock")]


def _trainings(workspace: Path) -> list[Path]:
    """Training folders, by the time of their last start."""
    notes = (workspace / "training").glob("*/inputs.json")
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
    project: Path, recipe: str, places: Places, records: Sequence[Record], kept: Kept, needed: set[Path]
) -> Iterator[Removal]:
    """Versions that are not kept and hold nothing that is needed."""
    for record in records:
        for name, artifact in record.written.items():
            if artifact.get("version") and (name, artifact["version"]) not in kept:
                folder = version_folder(project, recipe, artifact, places.get(name))
                if folder is not None and not any(place.is_relative_to(folder) for place in needed):
                    yield Removal(folder, f"{name} {artifact['version']}", size(folder))


def version_folder(project: Path, recipe: str, artifact: Artifact, place: Path | None = None) -> Path | None:
    """The folder of a version, if it is one: `<place>/<version>/<name>` or `data/<layer>/<recipe>/…/<version>/<name>`.

    Records may have been copied from elsewhere, so any other path is not followed.
    """
    path = PurePosixPath(artifact.get("path") or "")
    folder, data = project / path.parent, project / "data"
    if ".." in path.parts or folder.name != artifact["version"] or folder.parent.name != path.name:
        return None
    in_data = len(path.parts) >= 6 and path.parts[0] == "data" and path.parts[2] == recipe
    is_known = folder.parent == place or (in_data and folder.resolve().is_relative_to(data.resolve()))
    return folder if is_known and folder.is_dir() else None


def _pictures(manifest: Path, going: set[Path]) -> Iterator[Removal]:
    """Bytes that no manifest that stays names."""
    manifests = [path for path in manifest.glob(f"*/{manifest.name}") if path.parent not in going]
    if not manifests:
        return
    named = {name for manifest in manifests for name in _picture_files(manifest)}
    for file in sorted((manifest.parent / "files").glob("*")):
        if file.is_file() and file.name not in named:
            yield Removal(file, "picture that no kept version of images holds", file.stat().st_size)


def _picture_files(manifest: Path) -> Iterator[str]:
    with manifest.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            yield PurePosixPath(row["path"]).name


def _features(store: Path, used: set[str]) -> Iterator[Removal]:
    """Stored features of keys that nothing kept used. They are remade whenever they are missing."""
    for file in sorted(store.glob("*/key.json")):
        if file.parent.name not in used:
            yield Removal(file.parent, "stored features that no kept run used", size(file.parent))


def _feature_keys(kept_records: Sequence[Record]) -> set[str]:
    return {
        key
        for record in kept_records
        for artifacts in (record.read, record.written)
        for key in artifacts.get("image_features", {}).get("keys", ())
    }


def _tokenised(workspace: Path, kept_records: Sequence[Record]) -> Iterator[Removal]:
    """Tokenised samples of conversations that nothing kept read or wrote. They are remade whenever they are missing."""
    used = {
        artifact.get("sha256")
        for record in kept_records
        for artifacts in (record.read, record.written)
        for artifact in artifacts.values()
    }
    for header in sorted((workspace / "tokenised").glob("*/samples.json")):
        if _conversations_behind(header) not in used:
            yield Removal(header.parent, "tokenised samples that no kept run used", size(header.parent))


def _conversations_behind(header: Path) -> str:
    """The hash of the conversations' file; empty where the header is damaged."""
    try:
        return str(json.loads(header.read_text(encoding="utf-8"))["key"]["conversations"])
    except (ValueError, KeyError, TypeError):
        return ""


def _checkpoints(workspace: Path) -> Iterator[Removal]:
    """Training folders, but for the newest that can be gone on with and those in use."""
    staying = _unfinished_trainings(workspace)
    for folder in _trainings(workspace):
        if folder not in staying:
            yield Removal(folder, "checkpoints of a training that ended or was abandoned", size(folder))


def _killed_export(workspace: Path) -> Iterator[Removal]:
    """The model of an export that was ended before it was published: as large as the base."""
    for model in sorted((workspace / "export").glob("*")):
        yield Removal(model, "left by an export that was ended", size(model))


def _captions(workspace: Path, kept_records: Sequence[Record]) -> Iterator[Removal]:
    """Kept captions of held-out pictures that no kept run used. They are made again whenever they are missing."""
    sides = [side for record in kept_records for side in record.facts.get("captions", {}).values()]
    used = {side["key"] for side in sides}
    for file in sorted((workspace / "evaluation").glob("*.jsonl")):
        if file.stem not in used:
            yield Removal(file, "captions of held-out pictures that no kept run used", size(file))


def _killed_saves(project: Path, recipe: str, places: Places) -> Iterator[Removal]:
    """What killed processes left among the recipe's files, and beside the folders of all recipes."""
    is_quiet = not any(runs_under_way(project, name) for name in recipes(project))
    usual = [layer / recipe for layer in sorted((project / "data").glob("*"))]
    moved = [place for place in places.values() if not any(place.is_relative_to(folder) for folder in usual)]
    for place in [*usual, *moved]:
        shared = leftovers(place.parent) if is_quiet else []
        yield from (Removal(path, "left by a killed save", size(path)) for path in shared)
        for folder, subfolders, _ in os.walk(place):
            for path in leftovers(Path(folder)):
                if not Lock.is_held(path / ".lock"):
                    yield Removal(path, "left by a killed save", size(path))
            subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "files"]
