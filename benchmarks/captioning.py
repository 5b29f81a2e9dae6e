"""Captions of drawn pictures by inference, here and in another checkout, in turn: wall and CPU seconds.

    python -m benchmarks.captioning --against CHECKOUT [--adapter FOLDER] [--pictures 2000] [--repeats 3] [--out FOLDER]

Each run is a fresh process that captions with the tiny base, with an adapter if one is given; the clock starts when the
pictures are checked and the weights are loaded. The captions of both must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import write_json
from benchmarks.machine import current_commit, describe_machine, versions
from benchmarks.measuring import PROJECT, Record

BASE = PROJECT / "data" / "06_models" / "tiny_qwen2_vl"


def draw(folder: Path, count: int) -> None:
    """Write `count` drawings of the tiny recipe."""
    from qwen_vl_lora.tiny.source import draw_captioned_scenes

    for sample in draw_captioned_scenes(count, seed=7):
        (folder / f"{sample.id}.png").write_bytes(sample.images[0])


def caption(folder: Path, adapter: Path | None, threads: int) -> Record:
    """Caption the pictures of a folder in this process."""
    import torch
    import yaml

    import qwen_vl_lora
    from qwen_vl_lora.evaluation.inference import Captioner
    from qwen_vl_lora.model.adapter import Adapter
    from qwen_vl_lora.model.base_model import BaseModel
    from qwen_vl_lora.parameters import Parameters
    from qwen_vl_lora.samples.named_pictures import gather_pictures

    torch.set_num_threads(threads)
    own = (
        Path(qwen_vl_lora.__file__).parents[2] / "conf" / "base" / "parameters.yml"
    )  # another checkout lacks some keys
    settings = Parameters.model_validate(yaml.safe_load(own.read_text("utf-8")))
    gathered = gather_pictures([folder], settings.image, recursive=False)
    captioner = Captioner(BaseModel("tiny", BASE), adapter and Adapter(adapter), settings)
    first, *others = gathered.usable
    captioner.caption(gathered.images, [first], None)  # loads and imports
    began, busy, captions = time.perf_counter(), time.process_time(), dict[str, Any]()
    for part in captioner.written(gathered.images, others, 0):
        captions.update(part)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    texts = json.dumps([captions[sha256] for sha256 in others])
    return {
        "seconds": round(seconds, 2),
        "cpu_s": round(busy, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "captions": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }


def measure(checkout: Path, folder: Path, options: argparse.Namespace) -> Record:
    """`caption` in a fresh process with the sources of a checkout."""
    command = [sys.executable, "-m", "benchmarks.captioning", "--caption", str(folder)]
    command += ["--threads", str(options.threads), *(["--adapter", str(options.adapter)] if options.adapter else [])]
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}:{PROJECT}"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "load_after": round(os.getloadavg()[0], 2)}


def main() -> int:
    """Measure both in turn and write the runs down; gives 1 if captions differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.captioning", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="checkout to compare with")
    parser.add_argument("--adapter", type=Path, help="of the tiny base; none: captions of the base")
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--caption", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.caption:
        print(json.dumps(caption(options.caption, options.adapter, options.threads)))
        return 0
    sides = {"against": options.against, "here": PROJECT}
    runs: dict[str, list[Record]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-captioning-") as root:
        draw(Path(root), options.pictures)
        for _ in range(options.repeats):
            for side, checkout in sides.items():
                runs[side].append(measure(checkout, Path(root), options))
                print(side, runs[side][-1], flush=True)
    ratios = {
        kind: round(median(one[kind] for one in runs["against"]) / median(one[kind] for one in runs["here"]), 3)
        for kind in ("seconds", "cpu_s")
    }
    print("ratios of medians", ratios)
    machine, writes = describe_machine(), "adapter" if options.adapter else "base"
    results = {
        "commit": current_commit(PROJECT),
        "against": current_commit(options.against),
        "machine": machine,
        "versions": versions(),
        "pictures": options.pictures,
        "threads": options.threads,
        "ratios": ratios,
        "runs": runs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{results_name(machine)}-captioning-{writes}.json", results)
    return int(len({one["captions"] for side in runs.values() for one in side}) > 1)


if __name__ == "__main__":
    sys.exit(main())
