"""Servers on loopback for tests of captions by a server: the real `transformers serve`, and one with faults."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
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


@dataclass
class Reply:
    """What a faulty server does with one request.

    Attributes:
        text, finish, tokens, written, model: of an answer of the protocol; None leaves `model` and `tokens` out.
        status, headers, body: of the response; a body replaces the answer.
        pause: seconds before the response.
        drips: sends the body a byte at a time, each after `pause` seconds.
        breaks: closes the connection without a response.
    """

    text: str = "a dog"
    finish: str = "stop"
    tokens: int | None = 7
    written: int = 3
    model: str | None = "captions"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    pause: float = 0
    drips: bool = False
    breaks: bool = False

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"index": 0, "message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish}
        usage = None if self.tokens is None else {"prompt_tokens": self.tokens, "completion_tokens": self.written}
        answer = {"object": "chat.completion", "choices": [choice], "usage": usage, "model": self.model}
        return json.dumps({name: value for name, value in answer.items() if value is not None}).encode()


class FaultyServer:
    """A server of the protocol that does what a test says.

    Args:
        reply: from the JSON body of a question to a `Reply`.
        models: names in its list.
        owner: `owned_by` of its models.

    Attributes:
        asked: bodies of the questions, in order.
        keys: the header Authorization of each request.
        most_at_once: questions under way at once.
    """

    def __init__(self, reply=lambda body: Reply(), models=("captions",), owner="vllm", port=0) -> None:
        self.asked, self.keys, self.most_at_once, self._now = [], [], 0, 0
        faulty, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                faulty.keys.append(self.headers.get("Authorization"))
                listed = {"data": [{"id": name, "object": "model", "owned_by": owner} for name in models]}
                known = self.path == "/v1/models"
                self._send(Reply(status=200 if known else 404, body=json.dumps(listed if known else {}).encode()))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    faulty.keys.append(self.headers.get("Authorization"))
                    faulty.asked.append(body)
                    faulty._now += 1
                    faulty.most_at_once = max(faulty.most_at_once, faulty._now)
                try:
                    self._send(reply(body))
                finally:
                    with lock:
                        faulty._now -= 1

            def _send(self, reply):
                time.sleep(0 if reply.drips else reply.pause)
                if reply.breaks:
                    self.close_connection = True
                    return
                content = reply.content()
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for start in range(0, len(content), 1 if reply.drips else len(content) or 1):
                        self.wfile.write(content[start : start + 1] if reply.drips else content)
                        time.sleep(reply.pause if reply.drips else 0)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> FaultyServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
