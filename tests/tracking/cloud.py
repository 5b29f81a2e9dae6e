"""As much of SwanLab's cloud as its real client asks for, on loopback, with the faults that a cloud can have."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

KEY = "the-key-of-these-tests"
USER = "someone"
CREATED = "2026-01-01T00:00:00.000Z"


@dataclass
class CloudRun:
    """What the cloud knows of one run."""

    id: str
    rows: dict[tuple[str, int], Any] = field(default_factory=dict)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    state: str = "RUNNING"
    times_opened: int = 0

    def curve(self, key: str) -> dict[int, Any]:
        return {step: value for (name, step), value in sorted(self.rows.items()) if name == key}


class Cloud:
    """A server that can be well, answer with errors, say nothing, or refuse the key; changed while it runs."""

    def __init__(self) -> None:
        self.behaviour = "well"
        self.after: dict[str, str] = {}
        """Part of a path → the behaviour from the first request for it on."""
        self.received: list[bytes] = []
        self.files: dict[str, bytes] = {}
        self.runs: dict[str, CloudRun] = {}
        self.project: str | None = None
        self._closed = threading.Event()
        handler = type("Handler", (_Handler,), {"cloud": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def say_nothing(self) -> None:
        self._closed.wait()

    @property
    def run(self) -> CloudRun:
        (run,) = self.runs.values()
        return run

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                return answer(self, body, *match.groups())
        return 404, {"code": "Not_Found", "message": path}

    def login(self, body: Any) -> tuple[int, Any]:
        return 200, {"sid": "session", "expiredAt": "2100-01-01T00:00:00.000Z", "userInfo": {"username": USER}}

    def find_project(self, body: Any, name: str) -> tuple[int, Any]:
        if self.project != name:
            return 404, {"code": "Not_Found", "message": "no such project"}
        group, count = {"username": USER}, {"experiments": len(self.runs)}
        path = f"/{USER}/{name}"
        return 200, {"cuid": "p1", "version": 1, "name": name, "group": group, "_count": count, "path": path}

    def make_project(self, body: Any) -> tuple[int, Any]:
        self.project = body["name"]
        return 201, {}

    def open_run(self, body: Any) -> tuple[int, Any]:
        identity = body["cuid"]
        is_new = identity not in self.runs
        run = self.runs.setdefault(identity, CloudRun(identity))
        run.times_opened += 1
        run.state = "RUNNING"
        return 201 if is_new else 200, {"cuid": identity, "slug": identity, "name": body["name"], "createdAt": CREATED}

    def summarize(self, body: Any, identity: str) -> tuple[int, Any]:
        last: dict[str, int] = {}
        for key, step in self.runs[identity].rows:
            last[key] = max(step, last.get(key, -1))
        return 200, {"log": [], "media": [], "scalar": [{"key": key, "step": step} for key, step in last.items()]}

    def take_profile(self, body: Any, identity: str) -> tuple[int, Any]:
        self.runs[identity].config |= {name: entry["value"] for name, entry in body.get("config", {}).items()}
        return 200, {}

    def take_state(self, body: Any, identity: str) -> tuple[int, Any]:
        self.runs[identity].state = body["state"]
        return 200, {}

    def take_metrics(self, body: Any) -> tuple[int, Any]:
        run = self.runs[body["experimentId"]]
        for metric in body["metrics"]:
            if body["type"] == "scalar":
                run.rows[metric["key"], metric["index"]] = metric["data"]
            elif body["type"] == "media":
                run.pictures[metric["key"]] = [more["caption"] for more in metric["more"]]
                assert all(path in self.files for path in metric["data"])
            else:
                run.logs.append(metric["message"])
        return 200, {}

    def name_files(self, body: Any) -> tuple[int, Any]:
        return 200, {"urls": [f"{self.address}/files/{path}" for path in body["paths"]]}

    def nothing(self, body: Any, *parts: str) -> tuple[int, Any]:
        return 200, {}


_ROUTES = (
    (r"POST /api/login/api_key", Cloud.login),
    (rf"GET /api/project/{USER}/([^/]+)", Cloud.find_project),
    (rf"POST /api/projects/{USER}", Cloud.make_project),
    (rf"POST /api/project/{USER}/[^/]+/experiment", Cloud.open_run),
    (r"GET /api/house/metrics/summaries/p1/([^/?]+)(?:\?.*)", Cloud.summarize),
    (rf"PUT /api/project/{USER}/[^/]+/runs/([^/]+)/profile", Cloud.take_profile),
    (rf"PUT /api/project/{USER}/[^/]+/runs/([^/]+)/state", Cloud.take_state),
    (rf"POST /api/projects/{USER}/[^/]+/series", Cloud.nothing),
    (r"POST /api/house/metrics", Cloud.take_metrics),
    (r"POST /api/house/experiments/[^/]+/heartbeat", Cloud.nothing),
    (r"POST /api/resources/presigned/put", Cloud.name_files),
)


class _Handler(BaseHTTPRequestHandler):
    cloud: ClassVar[Cloud]
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        cloud = self.cloud
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = [self.requestline.encode(), bytes(self.headers), body]
        for part, behaviour in cloud.after.items():
            if part in self.path:
                cloud.behaviour = behaviour
        if cloud.behaviour == "silent":
            cloud.say_nothing()
            self.close_connection = True
        elif cloud.behaviour == "errors":
            self._reply(500, {"code": "Internal", "message": "something broke"})
        elif cloud.behaviour == "revoked":
            self._reply(401, {"code": "Unauthorized", "message": "the key is not valid"})
        else:
            cloud.received += said
            self._take(body)

    def _take(self, body: bytes) -> None:
        assert self.headers.get("Content-Encoding") is None  # the tests look for secrets in what was sent
        if self.path.startswith("/files/"):
            self.cloud.files[self.path.removeprefix("/files/")] = body
            self._reply(200, {})
        else:
            self._reply(*self.cloud.answer(self.command, self.path, json.loads(body) if body else None))

    do_GET = do_POST = do_PUT = _serve  # noqa: N815

    def _reply(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        pass
