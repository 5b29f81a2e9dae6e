"""Servers on loopback for tests of captions by a server: the real `transformers serve`, and one with faults."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2

from command_line import start


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def transformers_serve(model: Path, folder: Path, port: int | None = None) -> Iterator[tuple[str, object]]:
    """Address and process of a server of one model, from its first answer to the end of the block."""
    port = port or free_port()
    command = [sys.executable, str(Path(__file__).with_name("serving.py")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (folder / f"serve_{port}.log").open("a") as log:
        process = start(command, folder, stdout=log, stderr=log)
        try:
            with httpx2.Client(trust_env=False) as client:
                for _ in range(600):
                    with contextlib.suppress(httpx2.TransportError):
                        if client.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                            break
                    assert process.poll() is None, Path(log.name).read_text()
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", process
        finally:
            process.kill()
            process.wait()
