"""Start-up: `kedro registry list` in this project and in an empty Kedro project."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMAND = ["-m", "kedro", "registry", "list"]

_PYPROJECT = """\
[tool.kedro]
package_name = "empty_project"
project_name = "empty-project"
kedro_init_version = "{version}"
source_dir = "src"
"""
_REGISTRY = """\
from kedro.pipeline import Pipeline


def register_pipelines() -> dict[str, Pipeline]:
    return {"__default__": Pipeline([])}
"""


def make_empty_project(folder: Path, kedro_version: str) -> Path:
    """The least that Kedro takes for a project."""
    package = folder / "src" / "empty_project"
    package.mkdir(parents=True)
    (folder / "conf" / "base").mkdir(parents=True)
    (folder / "conf" / "local").mkdir()
    (folder / "pyproject.toml").write_text(_PYPROJECT.format(version=kedro_version), encoding="utf-8")
    (folder / ".telemetry").write_text("consent: false\n", encoding="utf-8")
    (package / "__init__.py").touch()
    (package / "settings.py").touch()
    (package / "pipeline_registry.py").write_text(_REGISTRY, encoding="utf-8")
    return folder


def time_start(project: Path) -> dict[str, Any]:
    """One cold process: seconds and peak memory of `kedro registry list`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *COMMAND], cwd=project, stdout=subprocess.DEVNULL, env=_environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, busy = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    if process.returncode:
        raise RuntimeError(f"kedro registry list failed in {project} with exit code {process.returncode}.")
    return {"seconds": round(seconds, 3), "cpu_s": round(busy, 3), "peak_mb": round(usage.ru_maxrss / 1024, 1)}


def imported_modules(project: Path) -> set[str]:
    """Every module that `kedro registry list` imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND],
        cwd=project,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def _environment() -> dict[str, str]:
    return {**os.environ, "DO_NOT_TRACK": "1"}
