"""A page of this project answers this machine's browser, and does nothing but show."""

import asyncio

import pytest

from qwen_vl_lora.commands.local_pages import LocalPages


def ask(method="GET", path="/", kind="http", is_read_only=True, **headers):
    """Status of the answer, and whether the application behind the guard was asked."""
    asked, sent = [], []

    async def application(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:4141", **headers}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items() if value is not None]
    scope = {"type": kind, "method": method, "path": path, "headers": raw}
    asyncio.run(LocalPages(application, is_read_only=is_read_only)(scope, None, send))
    return sent[0].get("status"), bool(asked), dict(sent[0].get("headers", []))


@pytest.mark.parametrize("host", ["127.0.0.1:4141", "localhost:4141", "LOCALHOST", "[::1]:4141", "localhost:9999"])
def test_this_machine_is_answered_whatever_port_is_forwarded(host):
    assert ask(host=host)[:2] == (200, True)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:4141",
        "127.0.0.1.evil.example",
        "localhost.evil.example:4141",
        "localhost@evil.example",
        "evil.example@localhost",
        "127.0.0.1:4141/evil",
        "192.168.0.7:4141",
        "0.0.0.0:4141",
        "localhost:port",
        "[::1",
    ],
)
def test_any_other_host_name_is_refused(host):
    assert ask(host=host)[:2] == (403, False)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:8888", "https://127.0.0.1:4141", ""]
)
def test_another_page_is_refused(origin):
    assert ask(origin=origin)[:2] == (403, False)


def test_the_page_itself_may_ask():
    assert ask(origin="http://127.0.0.1:4141")[:2] == (200, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"])
def test_nothing_is_changed(method):
    assert ask(method, "/api/deploy")[:2] == (405, False)


def test_a_page_that_changes_things_takes_posts_of_its_own():
    assert ask("POST", is_read_only=False, origin="http://127.0.0.1:4141")[:2] == (200, True)
    assert ask("POST", is_read_only=False, origin="http://evil.example")[:2] == (403, False)
    assert ask("POST", is_read_only=False, host="evil.example")[:2] == (403, False)
    assert ask("DELETE", is_read_only=False)[:2] == (405, False)


@pytest.mark.parametrize("path", ["/docs", "/docs/", "/redoc", "/openapi.json"])
def test_pages_that_load_scripts_from_elsewhere_are_closed(path):
    assert ask(path=path)[:2] == (404, False)


def test_two_hosts_and_sockets_are_refused():
    assert ask(kind="websocket")[:2] == (None, False)
    assert ask(Host="127.0.0.1")[:2] == (403, False)


def test_answers_allow_nothing_of_other_hosts():
    policy = ask()[2][b"content-security-policy"].decode()
    assert "default-src 'self'" in policy
    assert "http" not in policy
