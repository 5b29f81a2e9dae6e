"""What lies below `data/`, for comparing before and after a fault."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from PIL import Image


def snapshot(project: Path) -> dict[str, bytes]:
    """Every published file with its bytes; the workspace and run records are not artifacts."""
    files = (path for path in (project / "data").rglob("*") if path.is_file())
    return {
        path.relative_to(project).as_posix(): path.read_bytes()
        for path in files
        if "09_workspace" not in path.parts and "runs" not in path.parts
    }


def assert_nothing_was_lost(before: dict[str, bytes], project: Path) -> None:
    after = snapshot(project)
    changed = [name for name, data in before.items() if after.get(name) != data]
    assert not changed
    assert_whole(project)


def assert_whole(project: Path) -> None:
    """Every published file can be read to its end, and no save left anything beside them."""
    for name in snapshot(project):
        path = project / name
        assert not path.name.endswith(".partial"), path
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as lines:
                assert len({len(row) for row in csv.reader(lines)}) == 1, path
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
    assert not [path for path in (project / "data").rglob("*") if path.name.endswith(".partial")]


def assert_one_message(result, *parts: str) -> None:
    """One message and nothing else that looks like an error, and a status that says so."""
    assert result.returncode == 1, (result.stdout, result.stderr)
    said = " ".join(result.stderr.split())
    assert said.count("Error: ") == 1, result.stderr
    for part in parts:
        assert part in said, result.stderr
    both = (result.stdout or "") + result.stderr
    assert "Traceback" not in both
    assert "Logging error" not in both
