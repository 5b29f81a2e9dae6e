"""A small Hugging Face hub on loopback: the endpoints that huggingface_hub 2.4 asks for files of a model or data set.

Shapes of the answers: https://huggingface.co/docs/hub/api (datasets/{id}/revision, /tree; the same of models) and the
client's own reading of `resolve` (X-Repo-Commit, ETag, X-Linked-Etag, X-Linked-Size, Range).
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
from urllib.parse import unquote, urlsplit

import pytest

from hub.server import CHUNK, Fault, Request

LARGE = 10_000
"""Files from this size on are kept by LFS, as on the hub, and listed with their sha256."""


@dataclass
class Files:
    """Files of a repository; `listed` stands in the listing without being there, `described` in place of the truth."""

    files: dict[str, bytes]
    listed: list[dict] = field(default_factory=list)
    described: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def tree(self) -> list[dict]:
        folders = {name.rpartition("/")[0] for name in self.files} - {""}
        entries: list[dict] = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        for name, data in self.files.items():
            data = self.described.get(name, data)
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
            if len(data) >= LARGE:
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries + self.listed


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HuggingFaceServer:
    """`hub.add("owner/name", {...})`; `hub.endpoint` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.datasets: dict[tuple[str, str], Files] = {}
        self.models: dict[tuple[str, str], Files] = {}
        self.private: dict[str, bool] = {}
        self.storage = ""
        """Endpoint of another server that large files are fetched from, as from the hub's CDN."""
        self.blobs: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[Request] = []
        self.tokens: set[str | None] = set()
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HfHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> HuggingFaceServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> Files:
        return self.datasets.setdefault((name, revision), Files(files))

    def add_model(self, name: str, files: dict[str, bytes], revision: str = "main") -> Files:
        return self.models.setdefault((name, revision), Files(files))

    def fail(self, file: str, *faults: Fault) -> None:
        self.faults[file].extend(faults)

    def fetched(self) -> list[str]:
        """Files that were asked for, in order."""
        return [request.file for request in self.requests if request.file and request.method == "GET"]

    def asked_for(self, file: str) -> list[Request]:
        return [request for request in self.requests if request.file == file and request.method == "GET"]

    def repositories(self, kind: str) -> dict[tuple[str, str], Files]:
        return self.datasets if kind == "datasets" else self.models

    def find(self, kind: str, name: str, revision: str) -> Files | None:
        there = self.repositories(kind)
        known = {data.commit: data for (own, _), data in there.items() if own == name}
        return there.get((name, revision)) or known.get(revision)


class Handler(BaseHTTPRequestHandler):
    hub: HuggingFaceServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """What a push asks for: create, check the card, choose how each file is sent, commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(Request(self.command, path, "", None))
        self.hub.tokens.add(self.headers.get("Authorization"))
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/repos/create":
            private = lines[0]["visibility"] == "private"
            self._create(f"{lines[0]['organization']}/{lines[0]['name']}", private=private)
        elif path == "/api/validate-yaml":
            named = re.search(r"^base_model: (.*)$", lines[0]["content"], re.MULTILINE)
            is_bad = named and not re.fullmatch(r"[\w.-]+/[\w.-]+", named[1])
            errors = [{"message": f'"base_model" with value {named[1]} is not valid'}] if named and is_bad else []
            self._answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self._answer_json({"files": [self._mode(file) for file in lines[0]["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._answer_json({"transfer": "basic", "objects": [self._action(wish) for wish in lines[0]["objects"]]})
        elif asked := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(self.hub.models[asked[1], unquote(asked[2])], lines)
        else:
            self._fail(404, "EntryNotFound")

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.requests.append(Request(self.command, self.path, oid, None))
        fault = self.hub.faults[oid].pop(0) if self.hub.faults[oid] else Fault()
        if fault.status:
            self._fail(fault.status, "")
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer_json({})

    def _create(self, name: str, *, private: bool) -> None:
        if self.headers.get("Authorization") is None:
            self._fail(401, "")
        elif any(own == name for own, _ in self.hub.models):
            self._answer_json({"url": f"{self.hub.endpoint}/{name}"}, 409)
        else:
            self.hub.add_model(name, {})
            self.hub.private[name] = private
            self._answer_json({"url": f"{self.hub.endpoint}/{name}"})

    def _mode(self, file: dict) -> dict:
        mode = "lfs" if file["size"] >= LARGE else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _action(self, wish: dict) -> dict:
        send = {"upload": {"href": f"{self.hub.endpoint}/storage/{wish['oid']}"}}
        return wish if wish["oid"] in self.hub.blobs else {**wish, "actions": send}

    def _commit(self, files: Files, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value["summary"])
            else:
                large = line["key"] == "lfsFile"
                data = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
                files.files[value["path"]] = data
        self._answer_json({"commitUrl": f"{self.hub.endpoint}/o/n/commit/{files.commit}", "commitOid": files.commit})

    def _answer_json(self, value: object, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        resolved = re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        file = unquote(resolved[4]) if resolved else ""
        self.hub.requests.append(Request(self.command, path, file, self.headers.get("Range")))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if resolved:
            data = self.hub.find(resolved[1] or "models", resolved[2], unquote(resolved[3]))
            self._answer_file(data, file)
        elif asked := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._answer_listing(asked[1], asked[2], asked[3], unquote(asked[4]))
        elif asked := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)", path):
            self._answer_listing(asked[1], asked[2], "revision", "main")
        else:
            self._fail(404, "EntryNotFound")

    def _answer_listing(self, repositories: str, name: str, kind: str, revision: str) -> None:
        fault = self.hub.faults["listing"].pop(0) if self.hub.faults["listing"] else Fault()
        data = self.hub.find(repositories, name, revision)
        if fault.status:
            self._fail(fault.status, "")
        elif data is None:
            known = any(own == name for own, _ in self.hub.repositories(repositories))
            self._fail(404 if known else 401, "RevisionNotFound" if known else "RepoNotFound")
        else:
            tree = (
                data.tree()
                if kind == "tree"
                else {
                    "id": name,
                    "sha": data.commit,
                    "siblings": [],
                    "private": self.hub.private.get(name, False),
                }
            )
            body = b"<html>Log in</html>" if fault.corrupt else json.dumps(tree).encode()
            self._answer(body, {"Content-Type": "application/json"})

    def _answer_file(self, data: Files | None, name: str) -> None:
        if data is None or name not in data.files:
            self._fail(404, "EntryNotFound")
            return
        body = data.files[name]
        fault = self.hub.faults[name].pop(0) if self.command == "GET" and self.hub.faults[name] else Fault()
        if fault.status:
            self._fail(fault.status, "")
            return
        etag = hashlib.sha256(body).hexdigest() if len(body) >= LARGE else blob_id(body)
        headers = {"X-Repo-Commit": data.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
        if fault.corrupt:
            body = bytes(byte ^ 1 for byte in body)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.hub.storage and len(body) >= LARGE:
            linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
            self._answer(b"", {**headers, **linked, "Location": f"{self.hub.storage}{self.path}?sig=secret"}, 302)
            return
        self._answer(body[start:], headers, 206 if start else 200, fault)

    def _answer(self, body: bytes, headers: dict[str, str], status: int = 200, fault: Fault = Fault()) -> None:  # noqa: B008
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for place in range(0, len(body[: fault.cut]), CHUNK):
                time.sleep(fault.delay)
                self.wfile.write(body[: fault.cut][place : place + CHUNK])
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = self.close_connection or fault.cut is not None

    def _fail(self, status: int, code: str) -> None:
        self._answer(b"{}", {"X-Error-Code": code, "X-Error-Message": code or "fault"}, status)


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """A hub on loopback; endpoint and home of the client are all that differs from a user's machine."""
    from huggingface_hub import constants

    with HuggingFaceServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "huggingface" / "token"))
        yield server
