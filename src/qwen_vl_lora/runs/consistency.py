"""Selects stored versions that belong together: those of one complete run, never a mixture."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.runs.records import Record

logger = logging.getLogger(__name__)

_Writers = dict[tuple[str, str], Record]
"""(dataset, version) → the run that wrote it."""


def choose_versions(
    records: Sequence[Record], stored: Mapping[str, Sequence[str]], named: Mapping[str, str]
) -> dict[str, str]:
    """Select the version to read of each dataset that a pipeline needs from earlier runs.

    Args:
        records: all runs of the recipe, oldest first.
        stored: dataset → versions on disk, newest first; at least one each.
        named: dataset → version that the user named; the other versions follow it where possible.

    Returns:
        dataset → version for everything in `stored` that is not named.

    Raises:
        MissingArtifactError: if no run made or read all of them together, or if the stored versions were made from
            another version than a named one.
    """
    wanted = [name for name in stored if name not in named]
    if not wanted:
        return {}
    candidates = [versions for versions in _consistent_sets(records, stored) if set(wanted) <= versions.keys()]
    with_named = [versions for versions in candidates if named.items() <= versions.items()]
    agreeing = [versions for versions in candidates if all(versions.get(n, v) == v for n, v in named.items())]
    sets = [{name: versions[name] for name in wanted} for versions in [*with_named, *agreeing, *candidates]]
    writers = _writers(records)
    fitting = [chosen for chosen in sets if _contradiction(chosen, named, writers) is None]
    if fitting:
        _tell_of_newer(fitting[0], stored)
        return fitting[0]
    if sets:
        raise MissingArtifactError(_contradiction(sets[0], named, writers))
    common = _newest_common_version(wanted, stored)
    known = {record.id for record in records}
    if common is not None and common not in known:  # copied here, or written before runs were recorded
        return dict.fromkeys(wanted, common)
    listed = "; ".join(f"{name}: {', '.join(stored[name][:3])}" for name in wanted)
    raise MissingArtifactError(
        f"No complete run wrote {', '.join(wanted)} together. On disk: {listed}. Run the pipeline that writes them "
        "again, or name the versions to read: --load-versions "
        f'"{",".join(f"{name}:{stored[name][0]}" for name in wanted)}".'
    )


def _consistent_sets(records: Sequence[Record], stored: Mapping[str, Sequence[str]]) -> Iterable[dict[str, str]]:
    """Return all versions that belong to each run that wrote a needed dataset, newest run first."""
    writers = _writers(records)
    for record in reversed(records):
        own = record.complete_versions()
        if any(name in stored for name in own):
            versions = _without_strangers(versions_behind(record, records), writers)
            yield {name: version for name, version in versions.items() if version in stored.get(name, ())}


def _without_strangers(versions: Mapping[str, str], writers: _Writers) -> dict[str, str]:
    """Keep versions that were made from the others: not metrics of an earlier adapter on the same data."""
    return {
        name: version
        for name, version in versions.items()
        if _contradiction({name: version}, versions, writers) is None
    }


def _writers(records: Iterable[Record]) -> _Writers:
    return {(name, version): record for record in records for name, version in record.complete_versions().items()}


def versions_behind(record: Record, records: Iterable[Record]) -> dict[str, str]:
    """Return what the run wrote and read, and what the runs that made its inputs wrote and read.

    Where several name the same dataset, the nearer run takes precedence.
    """
    writers = _writers(records)
    versions: dict[str, str] = {}
    waiting, seen = [record], {record.id}
    while waiting:
        nearest = waiting.pop(0)
        for name, version in {**nearest.read_versions(), **nearest.complete_versions()}.items():
            versions.setdefault(name, version)
            writer = writers.get((name, versions[name]))
            if writer is not None and writer.id not in seen:
                seen.add(writer.id)
                waiting.append(writer)
    return versions


def _contradiction(chosen: Mapping[str, str], named: Mapping[str, str], writers: _Writers) -> str | None:
    """Describe a version that was made from another version than the named one, such as metrics of another adapter."""
    for name, version in chosen.items():
        writer = writers.get((name, version))
        used = {} if writer is None else _made_before(writer, name)
        for other, wanted in named.items():
            if used.get(other, wanted) != wanted:
                return (
                    f"{name} {version} was made from {other} {used[other]}, not from the {other} {wanted} that "
                    f"--load-versions names. First run the pipeline that writes {name} with the same --load-versions "
                    f"(`kedro registry describe` shows which), or name the version of {name} too."
                )
    return None


def _made_before(record: Record, name: str) -> dict[str, str]:
    """Return what the run had read or written when it wrote `name`. The record keeps the order of writing.

    What the run wrote afterwards and then read again, such as the split for the page of the data, came later.
    """
    versions = record.complete_versions()
    written = list(record.written)
    place = written.index(name)
    earlier, later = written[:place], written[place:]
    read = {other: version for other, version in record.read_versions().items() if other not in later}
    return {**read, **{other: versions[other] for other in earlier if other in versions}}


def _tell_of_newer(chosen: Mapping[str, str], stored: Mapping[str, Sequence[str]]) -> None:
    for name, version in chosen.items():
        if version != stored[name][0]:
            logger.info(
                "Reading %s %s instead of the newest, %s: it is the newest that belongs with the other inputs.",
                name,
                version,
                stored[name][0],
            )


def _newest_common_version(names: Sequence[str], stored: Mapping[str, Sequence[str]]) -> str | None:
    common = set.intersection(*(set(stored[name]) for name in names))
    return next((version for version in stored[names[0]] if version in common), None)
