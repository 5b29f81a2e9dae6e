"""Which stored versions belong together: those of one complete run, never a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qwen_vl_lora.exceptions import MissingArtifactError
from qwen_vl_lora.lineage.records import Record


def choose_versions(
    records: Sequence[Record], stored: Mapping[str, Sequence[str]], named: Mapping[str, str]
) -> dict[str, str]:
    """The version to read of each dataset that a pipeline needs from earlier runs.

    Args:
        records: all runs of the recipe, oldest first.
        stored: dataset → versions on disk, newest first; at least one each.
        named: dataset → version that the user named; the rest follows it where it can.

    Returns:
        dataset → version for everything in `stored` that is not named.

    Raises:
        MissingArtifactError: if no run made or read all of them together.
    """
    wanted = [name for name in stored if name not in named]
    if not wanted:
        return {}
    candidates = [versions for versions in _consistent_sets(records, stored) if set(wanted) <= versions.keys()]
    with_named = [versions for versions in candidates if named.items() <= versions.items()]
    agreeing = [versions for versions in candidates if all(versions.get(n, v) == v for n, v in named.items())]
    for versions in [*with_named, *agreeing, *candidates]:
        return {name: versions[name] for name in wanted}
    common = _newest_common_version(wanted, stored)
    known = {record.id for record in records}
    if common is not None and common not in known:  # copied here, or written before there were records
        return dict.fromkeys(wanted, common)
    listed = "; ".join(f"{name}: {', '.join(stored[name][:3])}" for name in wanted)
    raise MissingArtifactError(
        f"No complete run wrote {', '.join(wanted)} together. On disk are {listed}. Run the pipeline that writes them "
        "again, or name the versions that you want: --load-versions "
        f'"{",".join(f"{name}:{stored[name][0]}" for name in wanted)}".'
    )


def _consistent_sets(records: Sequence[Record], stored: Mapping[str, Sequence[str]]) -> Iterable[dict[str, str]]:
    """For every run that wrote something of what is needed, newest first: all versions that belong to it."""
    for record in reversed(records):
        own = record.complete_versions()
        if any(name in stored for name in own):
            versions = versions_behind(record, records)
            yield {name: version for name, version in versions.items() if version in stored.get(name, ())}


def versions_behind(record: Record, records: Iterable[Record]) -> dict[str, str]:
    """What the run wrote and read, and what else the runs wrote and read that made its inputs.

    The nearer run decides where several name the same dataset.
    """
    writers = {(name, version): other for other in records for name, version in other.complete_versions().items()}
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


def _newest_common_version(names: Sequence[str], stored: Mapping[str, Sequence[str]]) -> str | None:
    common = set.intersection(*(set(stored[name]) for name in names))
    return max(common, default=None)
