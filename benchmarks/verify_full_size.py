"""`make verify-full-size`: Qwen2-VL-2B at its true sizes, with random weights and the true vocabulary, on a CPU.

    python -m benchmarks.verify_full_size          # 2.2 billion parameters; under an hour on 2 quiet cores
    python -m benchmarks.verify_full_size --toy    # the same steps on a narrow model with the true vocabulary; minutes

A checkpoint in shards is built and put on a hub on loopback; the recipe `qwen2_vl_2b_coco` then runs on eight pictures
with `device: cpu`, pipeline by pipeline, each a process of its own as a person starts it: data, snapshot and features,
two optimizer steps of which the second is killed, the rest of the training, captions, the merged model, and the code of
its card by plain transformers. At the end the training runs once more without a kill: the weights must be equal.

Memory of a part is the largest that its processes had, sampled every INTERVAL seconds: what was resident, and of that
what they allocated themselves. The rest are pages of files, which the system can reclaim: a base that is loaded in its
own precision is used from its files. The table shows both without what importing the libraries takes, beside what the
part needs by its sizes: for the training what `qwen-vl-lora plan` says, for the others the weights alone.

Results go to `results/<date>-<machine>-full-size.json` and `.md` after each part. Needs 15 GB of disk and 14 GB of
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import full_size, replica
from benchmarks.bench import RESULTS, results_name
from benchmarks.jobs import read_json, write_json
from benchmarks.machine import current_commit, describe_machine, versions
from benchmarks.measuring import PROJECT, Record, report
from qwen_vl_lora.runs.storage import file_sha256

sys.path.insert(0, str(PROJECT / "tests"))  # the hub that the tests talk to
from hub.loopback import MODEL, add_coco, hub_environment, mapped_files_of
from hub.server import HubServer

ENV = "qwen2_vl_2b_coco"
PICTURES = 8
GEOMETRY = replica.GEOMETRIES["2b"]
TOY = replica.GEOMETRIES["narrow"]
INTERVAL = 0.02
LIBRARIES = "import torch, transformers, peft, pandas, kedro.framework.session"
GIVEN = {
    "device": "cpu",
    "training_args.save_steps": 1,
    "training_args.logging_steps": 1,
    # Two steps of the recipe's 1e-4 change less than bfloat16 keeps, and export refuses a merge that lost its adapter.
    "training_args.learning_rate": 0.01,
    "generation.max_new_tokens": 32,
}


class Verification:
    """One run of all parts, each a method that gives a record.

    Attributes:
        root: temporary folder.
        planned: what the plan says, from its part on.
    """

    def __init__(self, root: Path, hub: HubServer, options: argparse.Namespace) -> None:
        self.root, self.hub, self.options = root, hub, options
        self.geometry = TOY if options.toy else GEOMETRY
        self.base, self.project, self.log = root / "base", root / "project", root / "log.txt"
        full_size.copy_configuration(self.project)
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "SWANLAB_API_KEY"},
            **hub_environment(hub, root),
            "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "src"), os.environ.get("PYTHONPATH", "")]),
        }
        self.planned: Record = {}

    def parts(self) -> dict[str, Callable[[], Record]]:
        """In their order, by the name that the results give them."""
        return {
            "libraries": lambda: self._watch([sys.executable, "-c", LIBRARIES]),
            "build": self.build,
            "data": lambda: self._kedro("data_engineering"),
            "snapshot and features": self.encode,
            "plan": self.plan,
            "training, killed": self.train_and_kill,
            "training, resumed": self.resume,
            "captions": self.caption,
            "export": self.export,
            "plain transformers": self.load_plain,
            "training, not interrupted": self.train_again,
        }

    def build(self) -> Record:
        """Write the checkpoint in a process of its own, and put it on the hub with eight captioned pictures."""
        from qwen_vl_lora.model.base_model import BaseModel
        from qwen_vl_lora.tiny.partitions import Partition

        name = "TOY" if self.options.toy else "GEOMETRY"
        code = (
            "from pathlib import Path; from benchmarks import replica, verify_full_size; "
            f"replica.build_base(Path({str(self.base)!r}), verify_full_size.{name}, 'bfloat16')"
        )
        watched = self._watch([sys.executable, "-c", code])
        files = mapped_files_of(self.base)
        self.hub.add_model(MODEL, files)
        samples = list(replica.draw_samples(Partition.FINE_TUNING, PICTURES, 1, full_size.SOURCE_SIDE))
        add_coco(self.hub, [bytes(one.images[0]) for one in samples], [one.turns[-1].text for one in samples])
        shards = [len(data) for file, data in files.items() if file.endswith(".safetensors")]
        model = BaseModel(name=MODEL, path=self.base)
        self.sizes = model.geometry
        tokens = len(read_json(self.base / "tokenizer.json")["model"]["vocab"])
        return {**watched, "parameters": self.sizes.parameters, "shards": shards, "vocabulary": tokens}

    def encode(self) -> Record:
        """Download and verify the snapshot, then encode the pictures by the tower alone."""
        watched = self._kedro("training", "--to-nodes", "encode_images")
        asked = {file for file in self.hub.models[MODEL, "master"].files if self.hub.asked_for(file)}
        return {**watched, "estimated_mib": _mib(2 * self.sizes.vision_parameters), "files_downloaded": len(asked)}

    def plan(self) -> Record:
        """What `qwen-vl-lora plan` says of the training, with the base's own tokenizer."""
        command = [sys.executable, "-m", "qwen_vl_lora", "plan", "--json", *self._given()]
        done = subprocess.run(
            command, cwd=self.project, env=self.environment, capture_output=True, text=True, check=True
        )
        made = json.loads(done.stdout)
        (configured,) = (need for need in made["memory"] if need["is_configured"])
        self.planned = {
            "steps": made["steps"],
            "samples": made["samples"],
            "tokens": made["tokens"],
            "image_tokens": made["image_tokens"],
            "tokens_are_estimated": made["tokens_are_estimated"],
            "trainable_parameters": made["trainable_parameters"],
            "training_mib": _mib(configured["allocated"]),
        }
        return self.planned

    def train_and_kill(self) -> Record:
        """Train, and send SIGKILL as soon as the checkpoint of the first step is whole."""
        jobs = self.project / "data" / "09_workspace" / ENV / "training"
        watched = self._kedro("training", until=lambda: any(jobs.glob("*/checkpoint-1")))
        return {**watched, "estimated_mib": self.planned["training_mib"]}

    def resume(self) -> Record:
        """The same command again."""
        watched = self._kedro("training")
        summary = read_json(self._newest("08_reporting", "training_summary.json"))
        kept = ("steps", "samples", "first_loss", "last_loss", "resumed_from", "trainable_parameters", "dtype")
        found = {name: summary[name] for name in kept}
        as_planned = all(found[name] == self.planned[name] for name in ("steps", "trainable_parameters"))
        self.weights = self._adapter_weights()
        return {**watched, "estimated_mib": self.planned["training_mib"], **found, "as_planned": as_planned}

    def caption(self) -> Record:
        """Captions of the held-out pictures, of base and adapter, and their metrics."""
        watched = self._kedro("evaluation")
        metrics = read_json(self._newest("08_reporting", "caption_metrics.json"))
        return {**watched, "estimated_mib": self._whole_model, "captioned": metrics["num_images"]}

    def export(self) -> Record:
        """Merge, check and publish."""
        watched = self._kedro("export")
        merged = self._newest("06_models", "merged_model")
        size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
        return {**watched, "estimated_mib": self._whole_model, "bytes": size}

    def load_plain(self) -> Record:
        """The code of the card, which imports transformers and nothing of this project, on one of the pictures."""
        merged = self._newest("06_models", "merged_model")
        (code,) = re.findall(r"```python\n(.*?)```", (merged / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        (self.root / "picture.jpg").write_bytes(next(iter(self.hub.storage.values())))
        code = code.replace("path/to/this/folder", str(merged))
        watched = self._watch([sys.executable, "-W", "ignore", "-c", code], self.root, self.root / "caption.txt")
        said = (self.root / "caption.txt").read_text(encoding="utf-8").strip()
        return {**watched, "estimated_mib": self._whole_model, "wrote_characters": len(said)}

    def train_again(self) -> Record:
        """The training from its beginning, without a kill: the same weights, bit for bit."""
        watched = self._kedro("training", resume="never")
        equal = self._adapter_weights() == self.weights
        return {**watched, "estimated_mib": self.planned["training_mib"], "weights_are_equal": equal}

    @property
    def _whole_model(self) -> float:
        """MiB of the base in bfloat16, and of the adapter in float32."""
        return _mib(2 * self.sizes.parameters + 4 * self.planned["trainable_parameters"])

    def _adapter_weights(self) -> str:
        return file_sha256(self._newest("06_models", "adapter") / "adapter_model.safetensors")

    def _newest(self, layer: str, name: str) -> Path:
        return max((self.project / "data" / layer / ENV / name).iterdir()) / name

    def _given(self, **changes: Any) -> list[str]:
        return ["--env", ENV, "--params", ",".join(f"{name}={value}" for name, value in {**GIVEN, **changes}.items())]

    def _kedro(self, pipeline: str, *options: str, until: Callable[[], bool] | None = None, **changes: Any) -> Record:
        command = [sys.executable, "-m", "kedro", "run", "--pipeline", pipeline, *options, *self._given(**changes)]
        return self._watch(command, until=until)

    def _watch(
        self,
        command: list[str],
        folder: Path | None = None,
        output: Path | None = None,
        until: Callable[[], bool] | None = None,
    ) -> Record:
        """Largest memory of a command and its children; it is killed as soon as `until` holds.

        Raises:
            RuntimeError: if it fails, or ends before `until` holds.
        """
        most = {"anonymous_mib": 0.0, "resident_mib": 0.0}
        killed = False
        with (output or self.log).open("a", encoding="utf-8") as lines, self.log.open("a", encoding="utf-8") as log:
            process = psutil.Popen(command, cwd=folder or self.project, env=self.environment, stdout=lines, stderr=log)
            while process.poll() is None:
                most = {name: max(most[name], now) for name, now in _memory(process).items()}
                if until is not None and not killed and until():
                    process.kill()
                    killed = True
                time.sleep(INTERVAL)
        if not killed and (process.wait() or until is not None):
            tail = self.log.read_text(encoding="utf-8")[-4000:]
            raise RuntimeError(f"{' '.join(command[1:])[:300]} ended with {process.wait()}:\n{tail}")
        return most


def _memory(process: Any) -> dict[str, float]:
    """MiB of a process and its children now."""
    anonymous = resident = 0
    try:
        for one in (process, *process.children(recursive=True)):
            memory = one.memory_info()
            anonymous += memory.rss - memory.shared
            resident += memory.rss
    except psutil.Error:  # one of them has just ended
        return {"anonymous_mib": 0.0, "resident_mib": 0.0}
    return {"anonymous_mib": _mib(anonymous), "resident_mib": _mib(resident)}


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def render_table(results: Record) -> str:
    """The results as Markdown."""
    parts = {name: part for name, part in results["parts"].items() if "anonymous_mib" in part}
    libraries = parts["libraries"]
    lines = [
        f"{results['machine']}; commit {results['commit']}; torch {results['versions']['torch']}, transformers "
        f"{results['versions']['transformers']}, peft {results['versions']['peft']}; {results['threads']} threads.",
        "",
        f"Recipe `{ENV}`, geometry {results['geometry']}, random weights in bfloat16, {PICTURES} pictures, on a CPU.",
        "",
        f"Importing the libraries takes {libraries['resident_mib']:,.0f} MiB, "
        f"{libraries['anonymous_mib']:,.0f} of them allocated; the figures are what a part takes beyond that, in MiB.",
        "",
        "| part | seconds | estimated | measured, resident | of it allocated |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, part in parts.items():
        estimated = f"{part['estimated_mib']:,.0f}" if "estimated_mib" in part else ""
        measured = (f"{max(0, part[key] - libraries[key]):,.0f}" for key in ("resident_mib", "anonymous_mib"))
        if part is not libraries:
            lines.append(f"| {' | '.join((name, format(part['wall_s'], ',.0f'), estimated, *measured))} |")
    return "\n".join([*lines, "", *_findings(results["parts"])]) + "\n"


def _findings(parts: Record) -> list[str]:
    """What is not memory, as far as the parts have come."""
    kept = {
        name: {key: value for key, value in part.items() if not key.endswith(("_mib", "_s"))}
        for name, part in parts.items()
    }
    return [f"- {name}: {json.dumps(part)}" for name, part in kept.items() if part]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out all parts; gives 1 if steps are not those of the plan or the resumed weights are other ones."""
    options = _parse(arguments)
    machine = describe_machine()
    results: Record = {"commit": current_commit(PROJECT), "machine": machine, "versions": versions()}
    results |= {
        "geometry": "toy" if options.toy else "2b",
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
    }
    results["parts"] = {}
    file = options.out / f"{results_name(machine)}-full-size{'-toy' if options.toy else ''}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-full-", dir=options.work) as root, HubServer() as hub:
        for name, part in Verification(Path(root), hub, options).parts().items():
            started = time.perf_counter()
            results["parts"][name] = part()
            results["parts"][name]["wall_s"] = round(time.perf_counter() - started, 1)
            report(f"{name}: {json.dumps(results['parts'][name])}")
            write_json(file, results)
            file.with_suffix(".md").write_text(render_table(results), encoding="utf-8")
    found = results["parts"]
    resumed = found["training, resumed"]
    good = resumed["as_planned"] and resumed["resumed_from"] and found["training, not interrupted"]["weights_are_equal"]
    return 0 if good else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verify_full_size", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--toy", action="store_true", help="a narrow model with the true vocabulary")
    parser.add_argument("--work", type=Path, help="where everything lies meanwhile; default: the system's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
