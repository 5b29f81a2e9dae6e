"""Description of one artifact in a run record, and whether the artifact still matches it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_vl_lora.runs.run import Artifact
from qwen_vl_lora.runs.storage import file_sha256, files_sha256

TIMING_COLUMNS = frozenset({"samples_per_second"})
"""Columns of `training_log` that differ between equal runs."""

_TIMING_KEYS = frozenset({"seconds", "samples_per_second", "peak_memory_mb", "resumed_from"})
_MANIFEST = "manifest.csv"

ADAPTER_CARD = "README.md"
"""In an adapter's directory: written again with the metrics of each evaluation, so no part of the artifact."""


def describe_artifact(name: str, path: Path, root: Path, version: str | None) -> Artifact:
    """Return version, path and hashes of one stored artifact.

    `sha256` covers the bytes; for a folder, the names and hashes of its files. `content_sha256` leaves out
    timings and the run id, so that two runs can be compared; null if nothing would be left.
    """
    described: Artifact = {"version": version, "path": relative(path, root)}
    if path.is_dir():
        files = files_sha256(path)
        if name == "adapter":
            files.pop(ADAPTER_CARD, None)
        described |= {"sha256": digest(files), "files": files}
    else:
        described["sha256"] = file_sha256(path)
    content = content_sha256(name, path)
    return described if content == described["sha256"] else {**described, "content_sha256": content}


def content_sha256(name: str, path: Path) -> str | None:
    """Return the hash of the content that is equal in equal runs."""
    if name == "comparison_report":  # contains the run id and timings
        return None
    if name == "training_log":
        return hashlib.sha256(log_without_timing(path).encode()).hexdigest()
    if name == "training_summary":
        summary = json.loads(path.read_text(encoding="utf-8"))
        return digest({key: value for key, value in summary.items() if key not in _TIMING_KEYS})
    if name == "adapter":
        return digest(_adapter_content(path))
    return digest(files_sha256(path)) if path.is_dir() else file_sha256(path)


def log_without_timing(path: Path) -> str:
    """Return `training_log` as CSV text without timing columns."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    kept = [place for place, column in enumerate(rows[0]) if column not in TIMING_COLUMNS] if rows else []
    text = io.StringIO()
    csv.writer(text).writerows([row[place] for place in kept] for row in rows)
    return text.getvalue()


def _adapter_content(path: Path) -> dict[str, Any]:
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)  # a path; the base is identified by its fingerprint
    config = {name: sorted(value) if _is_names(value) else value for name, value in config.items()}  # PEFT writes sets
    left_out = {"adapter_record.json", "adapter_config.json", ADAPTER_CARD}
    files = {name: sha256 for name, sha256 in files_sha256(path).items() if name not in left_out}
    return {"config": config, "files": files}


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def digest(value: Any) -> str:
    """Return the hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_of_list(values: Iterable[Any]) -> str:
    """Return the `digest` of the list of these values, which need not be in memory together."""
    hashed, before = hashlib.sha256(), "["
    for value in values:
        hashed.update(f"{before}{json.dumps(value, sort_keys=True, ensure_ascii=False)}".encode())
        before = ", "
    hashed.update(b"[]" if before == "[" else b"]")
    return hashed.hexdigest()


def relative(path: Path, root: Path) -> str:
    """Return the path relative to the project if it is inside, else as it is."""
    for seen, home in ((path.absolute(), root.absolute()), (path.resolve(), root.resolve())):
        if seen.is_relative_to(home):
            return seen.relative_to(home).as_posix()
    return path.as_posix()


def fault_of(artifact: Artifact, root: Path) -> str | None:
    """Return what no longer matches the record, or None."""
    if "files" in artifact:
        return next(_changed_files(artifact, root), None)
    if artifact.get("sha256") is None:
        return None
    path = root / artifact.get("path", "")
    if not path.is_file():
        return f"{artifact.get('path')} is missing"
    if file_sha256(path) != artifact["sha256"]:
        return f"{artifact['path']} has different bytes"
    return _changed_picture(path, root) if path.name == _MANIFEST else None


def _changed_files(artifact: Artifact, root: Path) -> Iterator[str]:
    for name, sha256 in artifact["files"].items():
        path = root / artifact.get("path", "") / name
        if not path.is_file():
            yield f"{artifact.get('path')}/{name} is missing"
        elif file_sha256(path) != sha256:
            yield f"{artifact['path']}/{name} has different bytes"


def _changed_picture(manifest: Path, root: Path) -> str | None:
    """Check the pictures that a manifest names against their hashes."""
    with manifest.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            place = row.get("source") or row.get("path") or ""
            if not (root / place).is_file():
                return f"picture {row.get('id')!r}: {place} is missing"
            if file_sha256(root / place) != row.get("sha256"):
                return f"picture {row.get('id')!r}: {place} has different bytes"
    return None


def first_difference(one: Path, two: Path) -> str | None:
    """Return the first line in which two text artifacts differ; None if they are not text or not found."""
    if not (one.is_file() and two.is_file()):
        return None
    try:
        lines_of_one = one.read_text(encoding="utf-8").splitlines()
        lines_of_two = two.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for number, (line, other) in enumerate(zip(lines_of_one, lines_of_two, strict=False), start=1):
        if line != other:
            pairs = enumerate(zip(line, other, strict=False))
            common = next(
                (place for place, (one_of, other_of) in pairs if one_of != other_of), min(len(line), len(other))
            )
            return f"line {number}: {_around(line, common)} → {_around(other, common)}"
    if len(lines_of_one) != len(lines_of_two):
        return f"{len(lines_of_one)} lines → {len(lines_of_two)} lines"
    return None


def _around(line: str, place: int) -> str:
    """Return at most 120 characters of a line around `place`, where it differs from another line."""
    if len(line.strip()) <= 120:
        return line.strip()
    start = max(0, place - 60)
    end = start + 118
    return f"{'…' if start else ''}{line[start:end]}{'…' if end < len(line) else ''}"
