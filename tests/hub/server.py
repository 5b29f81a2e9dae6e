"""A small ModelScope on loopback: what the real client asks for, and the ways in which a hub fails.

Speaks the endpoints that modelscope 1.40 uses for model snapshots and for script datasets. Every
request is noted with its Range, so that a test can see what was asked for and what was not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

CHUNK = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One request as the server saw it. `file` is the repository file it asked for, if any."""

    method: str
    path: str
    file: str
    range: str | None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer: a status, other bytes, or an end after `cut` bytes. `delay`: seconds a chunk."""

    status: int = 0
    corrupt: bool = False
    cut: int | None = None
    delay: float = 0.0


@dataclass
class Repository:
    """Files of one revision; `listed` stands in the listing without being there, with whatever name."""

    files: dict[str, bytes]
    listed: list[dict] = field(default_factory=list)

    def listing(self) -> list[dict]:
        entries = [
            {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.files.items()
        ]
        return entries + self.listed


class HubServer:
    """`with HubServer() as hub: hub.add_model("Qwen/Tiny", {...})`; `hub.endpoint` is for MODELSCOPE_ENDPOINT."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Repository] = {}
        self.datasets: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.visibility: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[Request] = []
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add_model(self, repo_id: str, files: dict[str, bytes], revision: str = "master") -> Repository:
        return self.models.setdefault((repo_id, revision), Repository(files))

    def add_dataset(self, repo_id: str, files: dict[str, bytes], revision: str = "master") -> Repository:
        return self.datasets.setdefault((repo_id, revision), Repository(files))

    def fail(self, file: str, *faults: Fault) -> None:
        """The next answers for a file go wrong in this order; the ones after them are right."""
        self.faults[file].extend(faults)

    def asked_for(self, file: str) -> list[Request]:
        return [request for request in self.requests if request.file == file and request.method == "GET"]

    def next_fault(self, file: str) -> Fault:
        return self.faults[file].pop(0) if self.faults[file] else Fault()


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, or goes wrong as it was told."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, "", None))
        data: object = {}
        if path == "/api/v1/models":
            data = self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            data = {"objects": [self._action(wish) for wish in json.loads(body)["objects"]]}
        elif match := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(self.hub.models[match[1], match[2]], json.loads(body))
        self._answer_json({"Code": 200, "Success": True, "Data": data})

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(Request(self.command, self.path, oid, None))
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer_json({"Code": 200, "Success": True, "Data": {}})

    def _create(self, wish: dict) -> dict:
        name = f"{wish['Path']}/{wish['Name']}"
        if not any(own == name for own, _ in self.hub.models):
            self.hub.add_model(name, {})
            self.hub.visibility[name] = wish["Visibility"]
        return {"Path": wish["Path"], "Name": wish["Name"], "Visibility": self.hub.visibility.get(name, 5)}

    def _action(self, wish: dict) -> dict:
        send = {"upload": {"href": f"{self.hub.endpoint}/blobs/{wish['oid']}"}}
        return {**wish, "actions": {} if wish["oid"] in self.hub.blobs else send}

    def _commit(self, repository: Repository, wish: dict) -> None:
        self.hub.commits.append(wish["commit_message"])
        for action in wish["actions"]:
            large = action["type"] == "lfs"
            data = self.hub.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
            repository.files[action["path"]] = data

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        file = query.get("FilePath", "") or split.path.removeprefix("/storage/")
        self.hub.requests.append(Request(self.command, split.path, file, self.headers.get("Range")))
        revision = query.get("Revision") or "master"
        if split.path.startswith("/storage/"):
            self._answer_file(file, self.hub.storage.get(file))
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo(/files)?", split.path):
            self._answer_repository(self.hub.models.get((match[1], revision)), match[2], file)
        elif (match := re.fullmatch(r"/api/v1/models/([^/]+)/([^/]+)", split.path)) and any(
            own == f"{match[1]}/{match[2]}" for own, _ in self.hub.models
        ):
            seen = self.hub.visibility.get(f"{match[1]}/{match[2]}", 5)
            data = {"Path": match[1], "Name": match[2], "Visibility": seen}
            self._answer_json({"Code": 200, "Success": True, "Data": data})
        elif match := re.fullmatch(r"/api/v1/datasets/([^/]+(?:/[^/]+)?)/repo(/tree)?", split.path):
            repo_id = self._dataset_of(match[1])
            page = int(query.get("PageNumber", 1))
            self._answer_repository(self.hub.datasets.get((repo_id, revision)), match[2], file, page)
        elif match := re.fullmatch(r"/api/v1/datasets/([^/]+/[^/]+)", split.path):
            self._answer_dataset(match[1])
        else:
            self._answer_json({"Code": 404, "Success": False, "Message": f"no {split.path}"}, 404)

    def _dataset_of(self, name: str) -> str:
        ids = [repo_id for repo_id, _ in self.hub.datasets]
        return ids[int(name) - 1] if name.isdigit() else name

    def _answer_dataset(self, repo_id: str) -> None:
        ids = [known for known, _ in self.hub.datasets]
        if repo_id not in ids:
            self._answer_json({"Code": 404, "Success": False, "Message": "no such dataset"}, 404)
            return
        self._answer_json({"Code": 200, "Success": True, "Data": {"Id": ids.index(repo_id) + 1, "Type": 4}})

    def _answer_repository(self, repo: Repository | None, listing: str | None, file: str, page: int = 1) -> None:
        fault = self.hub.next_fault("listing") if listing else Fault()
        if fault.status:
            self._answer_json({"Code": fault.status, "Success": False, "Message": "fault"}, fault.status)
        elif repo is None:
            self._answer_json({"Code": 10010205001, "Success": False, "Message": "revision not found"}, 404)
        elif listing:
            files = repo.listing() if page == 1 else []
            self._answer_json({"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            self._answer_file(file, repo.files.get(file))

    def _answer_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer_file(self, name: str, data: bytes | None) -> None:
        if data is None:
            self._answer_json({"Code": 404, "Success": False, "Message": f"no file {name}"}, 404)
            return
        fault = self.hub.next_fault(name) if self.command == "GET" else Fault()
        if fault.status:
            self._answer_json({"Code": fault.status, "Success": False, "Message": "fault"}, fault.status)
            return
        start = self._range_start(len(data))
        body = bytes(byte ^ 1 for byte in data) if fault.corrupt else data
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", hashlib.sha256(data).hexdigest())
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if self.command == "GET":
            self._send(body[start : fault.cut], fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        try:
            for place in range(0, len(body), CHUNK):
                time.sleep(fault.delay)
                self.wfile.write(body[place : place + CHUNK])
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed: that is what the test is about
        self.close_connection = self.close_connection or fault.cut is not None

    def _range_start(self, size: int) -> int:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return min(int(match[1]), size) if match else 0
