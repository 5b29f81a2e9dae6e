"""Where a figure was measured: processor, cores, memory, versions, commit; never a host's name."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

CHANGES = "+changes"
H200_BF16_TFLOPS = 989
"""Dense bf16 peak of an H100 or H200 SXM, from NVIDIA's data sheet."""
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "kedro", "pillow")


def describe_machine() -> str:
    """`AMD EPYC, 2 cores, 24 GB RAM`."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{_processor()}, {os.cpu_count()} cores, {gigabytes:.0f} GB RAM"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def describe_gpu() -> str:
    """Name of the first GPU, by its driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def slug(machine: str) -> str:
    """For a file's name: `amd-epyc-2-cores-24-gb-ram`."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def current_commit(project: Path) -> str:
    """Short commit; `+changes` when the working tree differs from it, `none` before the first."""
    commit = _git(project, "rev-parse", "--short", "HEAD") or "none"
    # The results themselves lie in the working tree.
    changed = _git(project, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{commit}{CHANGES}" if changed else commit


def _git(project: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
