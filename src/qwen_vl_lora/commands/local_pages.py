"""A guard before every page that this project serves: for this machine's own browser and nobody else.

A server on the loopback interface is still reached by every page that is open in the browser: by a form that posts to
it, or by a host name that its owner lets point to 127.0.0.1 after the page was loaded. So a request must name the
loopback host and come from no other page. Pages that only show something are told nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

HOST = "127.0.0.1"
_LOOPBACK = frozenset({HOST, "localhost", "::1"})
_READING = frozenset({"GET", "HEAD"})
_ASKING = _READING | {"POST"}
# FastAPI's own pages load their scripts from another host.
_CLOSED = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class LocalPages:
    """An ASGI application that passes to another what this machine's browser asks for, and refuses the rest.

    Args:
        is_read_only: whether only requests that change nothing are passed on.
    """

    def __init__(self, application: Application, *, is_read_only: bool = True) -> None:
        self._application = application
        self._methods = _READING if is_read_only else _ASKING

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := refusal_of(scope, self._methods)) is not None:
            status, reason = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
        else:
            await self._application(scope, receive, _with_headers(send))


class LocalWsgiPages:
    """The same before a WSGI application that only reads, some of it by POST."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        names = {"HTTP_HOST": b"host", "HTTP_ORIGIN": b"origin"}
        headers = [(name, environ[key].encode("latin-1")) for key, name in names.items() if key in environ]
        asked = {"method": environ["REQUEST_METHOD"], "path": environ["PATH_INFO"], "headers": headers}
        refusal = refusal_of(asked, _ASKING)
        if refusal is None:
            return self._application(environ, start_response)
        status, reason = refusal
        start_response(f"{status} {HTTPStatus(status).phrase}", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason}\n".encode()]


def refusal_of(scope: Message, methods: Collection[str] = _READING) -> tuple[int, str] | None:
    """Status and reason where a request is refused."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
    origins = [value.decode("latin-1") for name, value in headers if name.lower() == b"origin"]
    if len(hosts) != 1 or _host_name(f"//{hosts[0]}") not in _LOOPBACK:
        return 403, "Only requests to localhost or 127.0.0.1 are answered."
    if any(origin.lower() != f"http://{hosts[0]}".lower() for origin in origins):
        return 403, "Requests from other pages are not answered."
    if scope["method"] not in methods:
        return 405, f"This page answers {', '.join(sorted(methods))} only."
    return (404, "Not found.") if scope["path"].rstrip("/") in _CLOSED else None


def _host_name(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        is_host = not (parts.username or parts.path or parts.query or parts.fragment) and parts.port != 0
    except ValueError:
        return None
    return parts.hostname if is_host else None


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return send_with_headers
