"""Surroundings of a run that may change its bits: versions, machine, threads, code. Never environment variables."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qwen_vl_lora.runs.masking import mask_text

DISTRIBUTION = "qwen-vl-lora"
ARITHMETIC = 3
"""Increase it when equal settings, data and libraries give other bits.

1: as transformers computes. 2: other order of operations in the tower, in attention and in the last layer, equal to
about 1e-5. 3: other rows in one forward pass.
"""
# Not direct requirements, but the results depend on them.
_BELOW = ("kedro-datasets", "numpy", "pillow", "safetensors", "tokenizers")


def describe_surroundings(project: Path, device: str) -> dict[str, Any]:
    """Return everything except data, parameters and base model that the result may depend on.

    Args:
        project: folder whose git state is recorded.
        device: the `device` parameter.
    """
    return {
        "git": git_state(project),
        "code_sha256": code_sha256(),
        "arithmetic": ARITHMETIC,
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **describe_computing(device),
    }


def describe_computing(device: str) -> dict[str, Any]:
    """Return device, threads and CPU. torch is queried only if the run has imported it."""
    torch: Any = sys.modules.get("torch")
    facts: dict[str, Any] = {"cpu": cpu_name(), "cores": os.cpu_count()}
    if torch is None:
        return {**facts, "device": None, "threads": None, "cpu_capability": None}
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        **facts,
        "device": f"cuda: {torch.cuda.get_device_name()}" if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def package_versions() -> dict[str, str]:
    """Return the installed versions of the project's requirements and of the packages that they compute with."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        required = ["torch", "transformers", "peft", "accelerate", "kedro", "pandas"]
    names = {match[0] for line in required if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))}
    versions = {}
    for name in sorted({*names, *_BELOW}):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_sha256() -> str:
    """Return the hex sha256 over the package's modules, which distinguishes two dirty working trees."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def git_state(project: Path) -> dict[str, Any] | None:
    """Return commit, whether the tree differs from it, and the remote without its token; None outside of git."""
    try:
        commit = _git(project, "rev-parse", "HEAD")
        status = _git(project, "status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return None
    try:
        remote = mask_text(_git(project, "remote", "get-url", "origin"))
    except (OSError, subprocess.SubprocessError):
        remote = None
    return {"commit": commit, "dirty": bool(status), "remote": remote}


def _git(project: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(project), *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=20)
    return result.stdout.strip()


@functools.cache
def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match[1] if match else platform.processor()
