"""`python -m benchmarks.gpu_box`: see the package."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.bench import RESULTS
from benchmarks.gpu_box.bring import COMMIT, SITE
from benchmarks.gpu_box.ledger import carry_out, finished
from benchmarks.machine import H200_BF16_TFLOPS, current_commit, describe_gpu, describe_machine, slug, versions
from benchmarks.measuring import PROJECT, Record, report


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing; gives 1 when a part failed or what it proves does not hold."""
    options = _parse(arguments)
    _use_brought()
    from benchmarks.gpu_box.parts import Box  # imports what was brought

    machine = describe_machine() if options.rehearse else f"{describe_gpu()}; {describe_machine()}"
    file = options.out / f"gpu-{slug(machine)}{'-rehearsed' if options.rehearse else ''}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    origin: Record = {"date": date.today().isoformat(), "commit": commit(), "code": code_digest(), "machine": machine}
    box = Box(options.work.absolute(), options.rehearse, file, origin["code"], options.peak_tflops)
    parts = box.parts()
    lines = carry_out(parts, file, options.minutes, {**origin, "versions": versions()})
    left = {part.name for part in parts} - finished(lines, origin["code"])
    report(f"{file.with_suffix('.md')}; not done: {', '.join(sorted(left)) or 'nothing'}")
    last = {line["part"]: line for line in lines}
    return 1 if any(line["state"] == "failed" or line.get("failures") for line in last.values()) else 0


def _use_brought() -> None:
    """Packages that `bring` unpacked, for this process and those that it starts, where Kedro is missing."""
    if importlib.util.find_spec("kedro") is None:
        if not SITE.is_dir():
            raise SystemExit(
                f"Kedro is not installed and {SITE.relative_to(PROJECT)} was not found. Make it with a package index "
                "(python -m benchmarks.gpu_box.bring) and bring it along in this checkout."
            )
        sys.path.insert(0, str(SITE))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(PROJECT / "src"))


def commit() -> str:
    """Of this checkout, which may be one without git: then of the one that it was brought from."""
    return COMMIT.read_text(encoding="utf-8") if COMMIT.is_file() else current_commit(PROJECT)


def code_digest() -> str:
    """Of all Python files that are measured or measure: results of other code are not taken over."""
    files = sorted(file for name in ("src", "benchmarks") for file in (PROJECT / name).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_box")
    work = Path(tempfile.gettempdir()) / "qwen-vl-lora-gpu-box"
    parser.add_argument("--minutes", type=float, default=9, help="after which it ends, whatever runs")
    parser.add_argument("--rehearse", action="store_true", help="narrow models on a CPU, which measure nothing")
    parser.add_argument("--peak-tflops", type=float, default=H200_BF16_TFLOPS, help="dense bf16 peak of the GPU")
    parser.add_argument("--work", type=Path, default=work, help="bases, data and adapters (25 GB), for a second call")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; the same for a second call")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
