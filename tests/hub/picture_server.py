"""A TLS server on loopback that is `pictures.example` and `mirror.example`, and a fetcher that lets it in."""

from __future__ import annotations

import contextlib
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from qwen_vl_lora.hub.fetching import Fetcher

CERTIFICATE = Path(__file__).with_name("pictures.pem")
PICTURE = bytes(range(256)) * 1000


class PictureServer:
    """TLS as `pictures.example` and `mirror.example`; `answers` maps a path to what is done with a request."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.answers = {"/a.jpg": lambda request: request.give(PICTURE)}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
                server.answers[self.path](self)

            def give(self, body: bytes, status: int = 200, length: int | None = None, to: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                if to:
                    self.send_header("Location", to)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def finish_request(self, request, client_address) -> None:
                with contextlib.suppress(OSError), context.wrap_socket(request, server_side=True) as tls:
                    super().finish_request(tls, client_address)

        self._server = Server((address, port), Handler)
        self.port = self._server.server_address[1]

    def __enter__(self) -> PictureServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str = "/a.jpg", host: str = "pictures.example") -> str:
        return f"https://{host}:{self.port}{path}"


def fetcher(server: PictureServer, timeout: float = 5.0, max_bytes: int = 10**6, **changes) -> Fetcher:
    """The rules as they are, but for loopback: its name, its address and its certificate are let in."""
    settings = {
        "resolve": lambda host, port: ["127.0.0.1"],
        "allows": lambda address: True,
        "tls": ssl.create_default_context(cafile=CERTIFICATE),
    }
    hosts = [f"{host}:{server.port}" for host in ("pictures.example", "mirror.example")]
    return Fetcher(hosts, timeout, max_bytes, **settings | changes)
