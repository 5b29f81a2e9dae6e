"""Captions of long tables by a server that answers at once, in runs that are killed twice: memory, time, no loss.

    python -m benchmarks.served [--pictures 20000,40000] [--out FOLDER]

Every picture has other bytes. What is measured is the product's part: reading, preparing, sending, keeping, the table.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.bench import results_name
from benchmarks.jobs import write_json
from benchmarks.machine import current_commit, describe_machine
from benchmarks.measuring import PROJECT, RESULTS, Record, report

REQUESTS = 8
KILLED_AT = (1 / 3, 2 / 3)
"""Shares of the pictures that are answered when the run is killed."""


class Server:
    """Answers each question with a caption, and counts how often each picture is asked about."""

    def __init__(self) -> None:
        self.asked: collections.Counter[bytes] = collections.Counter()
        counted = self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send({"data": [{"id": "captions", "object": "model", "owned_by": "vllm"}]})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                counted[hashlib.sha256(body).digest()] += 1
                choice = {"index": 0, "message": {"role": "assistant", "content": "a dog"}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 1, "completion_tokens": 3}
                self._send({"object": "chat.completion", "model": "captions", "choices": [choice], "usage": usage})

            def _send(self, answer: Record) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Connections of a killed run end without a word."""

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Server:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def measure(folder: Path, pictures: int) -> Record:
    """Caption so many pictures in runs that are killed at KILLED_AT, and once more to the end.

    Raises:
        RuntimeError: if the last run fails, or a picture has no caption in its table.
    """
    names = _draw(folder / "pictures", pictures)
    table = folder / "pictures.csv"
    table.write_text("image_path\n" + "".join(f"pictures/{name}\n" for name in names), encoding="utf-8")
    project = _project(folder / "project")
    with Server() as server:
        runs = [_run(project, table, server, int(share * pictures)) for share in (*KILLED_AT, 1)]
        asked = server.asked
    (written,) = (project / "data").glob("07_model_output/*/captions.csv/*/captions.csv")
    with written.open(encoding="utf-8", newline="") as lines:
        captions = [row["caption"] for row in csv.DictReader(lines)]
    if captions != ["a dog"] * pictures:
        raise RuntimeError(f"{captions.count('a dog')} of {pictures} pictures have a caption.")
    again = sum(asked.values()) - len(asked)
    seconds = sum(run["cpu_s"] for run in runs)
    return {
        "pictures": pictures,
        "runs": runs,
        "asked_again": again,
        "cpu_ms_a_picture": round(1000 * seconds / pictures, 2),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "load_after": round(os.getloadavg()[0], 2),
    }


def _draw(folder: Path, count: int) -> list[str]:
    """Write `count` small pictures, each with a pixel of its own."""
    folder.mkdir(parents=True)
    picture = Image.linear_gradient("L").resize((112, 112)).convert("RGB")
    for number in range(count):
        red, green, blue = number.to_bytes(3, "big")
        picture.putpixel((0, 0), (red, green, blue))
        picture.save(folder / f"{number}.png", compress_level=1)
    return [f"{number}.png" for number in range(count)]


def _project(folder: Path) -> Path:
    """A project without data beside the small base."""
    (folder / "src").mkdir(parents=True)
    shutil.copytree(PROJECT / "conf", folder / "conf")
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(PROJECT / name, folder)
    base = Path("data", "06_models", "tiny_qwen2_vl")
    shutil.copytree(PROJECT / base, folder / base)
    return folder


def _run(project: Path, table: Path, server: Server, until: int) -> Record:
    """One `kedro run`, killed once so many pictures were answered; the last is not killed."""
    given = {"images": table, "adapter": "none", "server.address": server.address, "server.requests": REQUESTS}
    given["server.image_tokens"] = "ignore"
    params = ",".join(f"inference.{name}={value}" for name, value in given.items())
    command = [sys.executable, "-m", "kedro", "run", "--pipeline", "inference", "--params", params]
    variables = {"PYTHONPATH": str(PROJECT / "src"), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    pictures, began = table.read_text(encoding="utf-8").count("\n") - 1, time.perf_counter()
    with (project / "run.log").open("a") as log:
        child = subprocess.Popen(command, cwd=project, env={**os.environ, **variables}, stdout=log, stderr=log)
        while until < pictures and len(server.asked) < until and child.poll() is None:
            time.sleep(0.05)
        if until < pictures:
            child.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != (-signal.SIGKILL if until < pictures else 0):
        raise RuntimeError(f"kedro run ended with {child.returncode}:\n{(project / 'run.log').read_text()[-2000:]}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
        "answered": len(server.asked),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each number of pictures, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served", description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", default="20000,40000", help="numbers of pictures, comma-separated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    results: Record = {"machine": describe_machine(), "commit": current_commit(PROJECT), "sizes": []}
    for number in map(int, options.pictures.split(",")):
        with tempfile.TemporaryDirectory(prefix="qwen-vl-lora-served-") as root:
            results["sizes"].append(measure(Path(root), number))
        report(json.dumps(results["sizes"][-1]))
        write_json(options.out / f"{results_name(results['machine'])}-served.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
