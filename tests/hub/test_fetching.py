"""Pictures by address: the rules hold against a real TLS server on loopback, whose address is let in for the test."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time

import pytest

from hub.picture_server import PICTURE, PictureServer, fetcher
from hub.server import HubServer
from qwen_vl_lora.hub.fetching import Fetcher, FetchError, is_public


@pytest.fixture
def server():
    with PictureServer() as running:
        yield running


def refusal(fetch: Fetcher, address: str) -> tuple[str, str]:
    with pytest.raises(FetchError) as caught:
        fetch.fetch(address)
    return caught.value.kind, caught.value.detail


def redirect(to: str):
    return lambda request: request.give(b"", 302, to=to)


def test_a_picture_is_fetched_over_tls(server):
    assert fetcher(server).fetch(server.url()) == PICTURE


def test_an_http_address_on_a_listed_host_is_asked_by_https(server):
    assert fetcher(server).fetch(server.url().replace("https", "http")) == PICTURE


def test_a_redirect_within_the_listed_hosts_is_followed(server):
    server.answers["/old.jpg"] = redirect(server.url(host="mirror.example"))
    assert fetcher(server).fetch(server.url("/old.jpg")) == PICTURE
    assert server.asked == ["pictures.example/old.jpg", "mirror.example/a.jpg"]


@pytest.mark.parametrize(
    "address",
    [
        "ftp://pictures.example/a.jpg",
        "file:///etc/passwd",
        "https://user:word@pictures.example/a.jpg",
        "https://",
        "https://pictures.example:99999/a.jpg",
        "https://[::1/a.jpg",
        "https://elsewhere.example/a.jpg",
        "https://pictures.example/a.jpg",  # listed for another port alone
        "https://pictures.example.evil.example/a.jpg",
    ],
)
def test_other_addresses_are_refused_and_nobody_is_asked(server, address):
    def nobody(host: str, port: int) -> list[str]:
        raise AssertionError("resolved")

    assert refusal(fetcher(server, resolve=nobody), address)[0] == "refused"


@pytest.mark.parametrize("to", ["https://elsewhere.example/a.jpg", "http://169.254.169.254/latest/meta-data/"])
def test_a_redirect_to_an_unlisted_host_is_refused(server, to):
    server.answers["/old.jpg"] = redirect(to)
    kind, detail = refusal(fetcher(server), server.url("/old.jpg"))
    assert (kind, "is not allowed" in detail) == ("refused", True)


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "ff02::1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_a_listed_host_with_a_private_address_is_refused_and_not_asked(server, address):
    fetch = fetcher(server, resolve=lambda host, port: ["93.184.216.34", address], allows=is_public)
    kind, detail = refusal(fetch, server.url())
    assert (kind, f"is {address}, which is not a public address" in detail) == ("refused", True)
    assert server.asked == []


def test_a_redirect_to_a_private_address_is_refused_and_not_asked(server):
    server.answers["/old.jpg"] = redirect(server.url(host="mirror.example"))
    names = {"pictures.example": "127.0.0.1", "mirror.example": "10.0.0.1"}
    fetch = fetcher(
        server, resolve=lambda host, port: [names[host]], allows=lambda address: str(address) == "127.0.0.1"
    )
    assert refusal(fetch, server.url("/old.jpg"))[0] == "refused"
    assert server.asked == ["pictures.example/old.jpg"]


def test_a_name_is_resolved_once_and_that_address_is_asked(server):
    answers = iter([["127.0.0.1"]])  # a second question would raise StopIteration
    assert fetcher(server, resolve=lambda host, port: next(answers)).fetch(server.url()) == PICTURE


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_a_certificate_of_nobody_is_not_believed(server):
    kind, detail = refusal(fetcher(server, tls=ssl.create_default_context()), server.url())
    assert (kind, "certificate of pictures.example is not valid" in detail) == ("failed", True)


@pytest.mark.parametrize("announced", [True, False])
def test_an_answer_above_the_limit_is_not_read_to_its_end(server, announced):
    def endless(request) -> None:
        request.send_response(200)
        if announced:
            request.send_header("Content-Length", str(10**12))
        request.end_headers()
        try:
            while True:
                request.wfile.write(bytes(65536))
        except OSError:
            server.asked.append("stopped")

    server.answers["/big.jpg"] = endless
    assert refusal(fetcher(server, max_bytes=100_000), server.url("/big.jpg"))[0] == "too_large"


@pytest.mark.parametrize("drip", [0.0, 0.05])
def test_a_server_that_hangs_or_drips_ends_with_the_time(server, drip):
    def slow(request) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(200):
                if drip:
                    request.wfile.write(b"x")
                time.sleep(drip or 0.05)
        except OSError:
            pass

    server.answers["/slow.jpg"] = slow
    started = time.monotonic()
    assert refusal(fetcher(server, timeout=0.6), server.url("/slow.jpg"))[0] == "failed"
    assert time.monotonic() - started < 3


def test_a_name_server_that_hangs_ends_with_the_time(server):
    started = time.monotonic()
    fetch = fetcher(server, timeout=0.5, resolve=lambda host, port: time.sleep(5) or [])
    assert refusal(fetch, server.url())[0] == "failed"
    assert time.monotonic() - started < 2


def test_a_busy_server_is_asked_again(server):
    faults = iter([503, 500])

    def busy(request) -> None:
        status = next(faults, 200)
        request.give(PICTURE if status == 200 else b"", status)

    server.answers["/busy.jpg"] = busy
    assert fetcher(server).fetch(server.url("/busy.jpg")) == PICTURE


def test_a_broken_connection_is_tried_three_times(server):
    def cut(request) -> None:
        request.give(b"half", length=1000)

    server.answers["/cut.jpg"] = cut
    kind, detail = refusal(fetcher(server), server.url("/cut.jpg"))
    assert (kind, "after 3 attempts" in detail) == ("failed", True)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [404, 403])
def test_a_picture_that_is_not_there_is_asked_for_once(server, status):
    server.answers["/no.jpg"] = lambda request: request.give(b"", status)
    kind, detail = refusal(fetcher(server), server.url("/no.jpg"))
    assert (kind, str(status) in detail) == ("failed", True)
    assert len(server.asked) == 1


def test_redirects_in_a_circle_end(server):
    server.answers["/loop.jpg"] = redirect(server.url("/loop.jpg"))
    assert "More than 5 redirects" in refusal(fetcher(server), server.url("/loop.jpg"))[1]


def test_a_server_that_the_user_named_is_asked_as_it_is(hub_like):
    origin, body = hub_like
    fetch = Fetcher([], 5.0, 10**6, trusted_origins=[origin])
    assert fetch.fetch(f"{origin}/storage/a.jpg") == body
    assert refusal(fetch, origin.replace("127.0.0.1", "127.0.0.2") + "/storage/a.jpg")[0] == "refused"


@pytest.fixture
def hub_like():
    with HubServer() as server:
        server.storage["a.jpg"] = PICTURE
        yield server.endpoint, PICTURE


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/图片/1.jpg?大小=原", "/%E5%9B%BE%E7%89%87/1.jpg?%E5%A4%A7%E5%B0%8F=%E5%8E%9F"),
        ("/a b.jpg?x=%20+[1]|é", "/a%20b.jpg?x=%20+[1]|%C3%A9"),
    ],
)
def test_an_address_in_any_script_is_fetched(server, written, asked):
    server.answers[asked] = lambda request: request.give(PICTURE)
    assert fetcher(server).fetch(server.url(written)) == PICTURE


def test_an_address_that_is_no_text_is_a_failure_of_its_own(server):
    kind, detail = refusal(fetcher(server), server.url("/\udce9.jpg"))
    assert (kind, "is not valid" in detail) == ("failed", True)


@pytest.mark.parametrize(
    ("to", "asked"), [("/图.jpg".encode().decode("latin-1"), "/%E5%9B%BE.jpg"), ("/caf\xe9 1.jpg", "/caf%E9%201.jpg")]
)
def test_a_redirect_is_followed_by_the_bytes_it_was_given_in(server, to, asked):
    server.answers |= {"/old.jpg": redirect(to), asked: lambda request: request.give(PICTURE)}
    assert fetcher(server).fetch(server.url("/old.jpg")) == PICTURE


def test_a_redirect_to_no_address_is_a_failure_and_asked_for_once(server):
    server.answers["/old.jpg"] = redirect("https://[x")
    kind, detail = refusal(fetcher(server), server.url("/old.jpg"))
    assert (kind, "is not valid" in detail) == ("failed", True)
    assert len(server.asked) == 1


def test_an_address_that_refuses_does_not_hide_the_next_one_of_its_host(server):
    fetch = fetcher(server, resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"])  # nobody listens at the first
    assert fetch.fetch(server.url()) == PICTURE


def test_an_address_that_is_silent_leaves_time_for_the_next_one_of_its_host(server):
    with socket.create_server(("127.0.0.2", server.port)):  # takes the connection, and never says a word of TLS
        fetch = fetcher(server, timeout=2.0, resolve=lambda host, port: ["127.0.0.2", "127.0.0.1"])
        assert fetch.fetch(server.url()) == PICTURE
