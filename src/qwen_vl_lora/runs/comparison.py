"""Differences between two runs, or between a run's record and the current state of the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_vl_lora.runs.artifacts import fault_of, first_difference
from qwen_vl_lora.runs.records import Record
from qwen_vl_lora.runs.run import Artifact

BASE_MODEL = "base_model"
_FEATURES = "image_features"
_SURROUNDINGS = ("python", "platform", "cpu", "cpu_capability", "device", "threads", "code_sha256")


@dataclass(frozen=True)
class Differences:
    """The differences, each list in the order of the data flow.

    Attributes:
        artifacts: `name: what`, inputs before outputs.
        parameters: `key: theirs → ours`.
        surroundings: versions, machine and code; they may explain a difference but do not count as one.
    """

    artifacts: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    surroundings: list[str] = field(default_factory=list)

    @property
    def are_there(self) -> bool:
        return bool(self.artifacts or self.parameters)


def compare_with_disk(
    record: Record, project: Path, parameters: Mapping[str, Any], now: Mapping[str, Any]
) -> Differences:
    """Compare a run's record with the current artifacts, parameters and surroundings.

    Args:
        parameters: what the run's command would resolve to now, masked like a record.
        now: surroundings, from `describe_surroundings`.
    """
    faults = {name: fault_of(artifact, project) for name, artifact in in_flow_order(record).items()}
    return Differences(
        [f"{name}: {fault}" for name, fault in faults.items() if fault is not None],
        differing_settings(record.facts.get("parameters", {}), parameters),
        differing_surroundings(record.facts, now),
    )


def compare_runs(one: Record, two: Record, project: Path) -> Differences:
    """Compare two runs by their records; for artifacts that still exist, show the first differing line."""
    artifacts_of_one, artifacts_of_two = in_flow_order(one), in_flow_order(two)
    found = []
    for name, artifact in artifacts_of_one.items():
        other = artifacts_of_two.get(name)
        what = "only in the first run" if other is None else _difference(artifact, other, project)
        if what is not None:
            found.append(f"{name}: {what}")
    found += [f"{name}: only in the second run" for name in artifacts_of_two if name not in artifacts_of_one]
    surroundings = differing_surroundings(one.facts, two.facts)
    features = [records.get(_FEATURES, {}).get("sha256") for records in (artifacts_of_one, artifacts_of_two)]
    if None not in features and features[0] != features[1]:
        surroundings.append("image_features: stored in different files (encoded in different batches)")
    parameters = differing_settings(one.facts.get("parameters", {}), two.facts.get("parameters", {}))
    return Differences(found, parameters, surroundings)


def in_flow_order(record: Record) -> dict[str, Artifact]:
    """Return all artifacts of a run: those it read first, then those it wrote, in the order of writing."""
    written = record.written
    return {**{name: artifact for name, artifact in record.read.items() if name not in written}, **written}


def _difference(one: Artifact, two: Artifact, project: Path) -> str | None:
    hashes = [artifact.get("content_sha256", artifact.get("sha256")) for artifact in (one, two)]
    if hashes[0] == hashes[1] or None in hashes:
        return None
    if "files" in one and "files" in two:
        return f"different bytes in {', '.join(_differing_files(one['files'], two['files']))}"
    if "describe" in one and "describe" in two:
        return "; ".join(differing_settings(one["describe"], two["describe"])) or "other bytes"
    line = first_difference(project / one["path"], project / two["path"])
    return f"{one['version']} and {two['version']} differ{': ' + line if line else ''}"


def _differing_files(one: Mapping[str, str], two: Mapping[str, str]) -> list[str]:
    names = sorted({*one, *two})
    differing = [name for name in names if one.get(name) != two.get(name) and name != "adapter_record.json"]
    return differing or ["adapter_config.json"]


def differing_settings(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return a line such as `lora.r: 64 → 8` for every leaf that differs."""
    flat_one, flat_two = flatten(one), flatten(two)
    names = [*flat_one, *(name for name in flat_two if name not in flat_one)]
    return [
        f"{name}: {flat_one.get(name, 'not set')} → {flat_two.get(name, 'not set')}"
        for name in names
        if flat_one.get(name, "not set") != flat_two.get(name, "not set")
    ]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → leaf."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def differing_surroundings(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return versions, machine, code and commit that differ. Facts that one side lacks are left out."""
    packages = differing_settings(one.get("packages", {}), two.get("packages", {}))
    pairs = [(name, one.get(name), two.get(name)) for name in _SURROUNDINGS]
    git_of_one, git_of_two = one.get("git") or {}, two.get("git") or {}
    pairs += [(f"git {name}", git_of_one.get(name), git_of_two.get(name)) for name in ("commit", "dirty")]
    others = [
        f"{name}: {ours} → {theirs}" for name, ours, theirs in pairs if None not in (ours, theirs) and ours != theirs
    ]
    return [*packages, *others, *_other_arithmetic(one, two)]


def _other_arithmetic(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Whether one of the runs was made by a version of this project that rounds otherwise; the oldest stored none."""
    versions = [facts.get("arithmetic", 1) for facts in (one, two) if "code_sha256" in facts]
    if len(set(versions)) < 2:
        return []
    return [
        f"arithmetic: {versions[0]} → {versions[1]} (the order of operations in this project has changed: features and "
        "adapters are equal to rounding, not bit for bit)"
    ]
