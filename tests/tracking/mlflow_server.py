"""A real `mlflow server` on loopback, and a door to it that can answer with errors or say nothing."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from tracking.runs import wait_for


class MLflowServer:
    """A server of its own process, with its files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--backend-store-uri",
            "sqlite:///mlflow.db",
            "--artifacts-destination",
            "./files",
            "--workers",
            "1",
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, cwd=folder, env={**environment, **quiet}, stdout=nothing, stderr=nothing, start_new_session=True
        )
        try:
            wait_for(self._is_well, 120)
        except BaseException:
            self.close()
            raise

    def _is_well(self) -> bool:
        assert self._process.poll() is None, "mlflow server ended"
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def close(self) -> None:
        """End the server and its worker."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, 15)
            self._process.wait(30)

    def ask(self, path: str, body: Any = None) -> Any:
        """Ask the server's own interface."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.address}/api/2.0/{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return json.load(answer)

    def runs(self, experiment: str) -> list[Any]:
        """All runs of an experiment."""
        found = self.ask(f"mlflow/experiments/get-by-name?experiment_name={experiment}")["experiment"]
        return self.ask("mlflow/runs/search", {"experiment_ids": [found["experiment_id"]]}).get("runs", [])

    def curve(self, run: Any, name: str) -> list[tuple[int, float]]:
        """Steps and values of a metric, as they came."""
        told = self.ask(f"mlflow/metrics/get-history?run_id={run['info']['run_id']}&metric_key={name}")
        return sorted((int(point.get("step", 0)), point["value"]) for point in told.get("metrics", []))

    def files(self, run: Any, folder: str = "") -> list[str]:
        """Paths of a run's artifacts."""
        told = self.ask(f"mlflow/artifacts/list?run_id={run['info']['run_id']}&path={folder}").get("files", [])
        inner = [self.files(run, file["path"]) if file.get("is_dir") else [file["path"]] for file in told]
        return sorted(path for paths in inner for path in paths)

    def read(self, run: Any, path: str) -> bytes:
        """An artifact."""
        folder = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
        address = f"{self.address}/api/2.0/mlflow-artifacts/artifacts/{folder}/{path}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.read()


class Door:
    """Passes requests to a server as long as it is `well`; else it answers with `errors`, or is `silent`."""

    def __init__(self, server: MLflowServer) -> None:
        self.behaviour = "well"
        self.received: list[bytes] = []
        self.port = server.port
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"door": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    door: ClassVar[Door]
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        door = self.door
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if door.behaviour == "silent":
            door.closed.wait()
            self.close_connection = True
        elif door.behaviour == "errors":
            self._reply(500, b'{"error_code": "INTERNAL_ERROR", "message": "something broke"}')
        else:
            door.received += [self.requestline.encode(), bytes(self.headers), body]
            connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=60)
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")
            }
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            self._reply(answer.status, answer.read())
            connection.close()

    do_GET = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
