"""Packages for a bare GPU host, unpacked: `python -m benchmarks.gpu_box.bring`.

Versions are those of requirements.txt, files those for CPython 3.12 on x86-64 Linux. They go into `.gpu_box/site` of
this checkout, which git ignores, with the commit beside them. Checkout and packages together must stay below LIMIT.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import current_commit
from benchmarks.measuring import PROJECT

LIMIT = 64 * 2**20
FOLDER = PROJECT / ".gpu_box"
SITE, COMMIT = FOLDER / "site", FOLDER / "commit"
NAMES = Path(__file__).with_name("brought.txt")
TARGET = ["--python-version", "3.12", "--implementation", "cp"]
TARGET += [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_17", "2014")]


def main() -> int:
    """Fill the folder; gives 1 if it is too large."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    locked = [f"--constraint={PROJECT / name}" for name in ("requirements.txt", "requirements-vocabulary.txt")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(SITE)]
    subprocess.run([*command, *TARGET, *locked, "--requirement", str(NAMES)], check=True)
    COMMIT.write_text(current_commit(PROJECT), encoding="utf-8")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    tracked = [PROJECT / name for name in listed.split("\0") if name and (PROJECT / name).is_file()]
    size = sum(file.stat().st_size for file in [*tracked, *FOLDER.rglob("*")] if file.is_file())
    print(f"{FOLDER.name}: with the checkout {size / 2**20:.1f} MiB, at most {LIMIT // 2**20}")
    return 1 if size > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
