"""Whatever a server of captions does is bounded, reported once, and costs no caption that was written."""

import itertools
import json
import re
import threading
import time

import pytest
from pydantic import ValidationError

from evaluation.servers import FaultyServer, Reply, free_port
from qwen_vl_lora.evaluation import chat_client as client
from qwen_vl_lora.evaluation.chat_client import NotAnsweredError, connected
from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.inference_parameters import KEY, ServerParameters
from qwen_vl_lora.runs import masking

SECRET = "a-key-of-Nobody-42"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)
    monkeypatch.delenv(KEY, raising=False)


def ask(server, count=3, known=0, **changes):
    """Answers and reasons by the number of the question."""
    addresses = server.address if isinstance(server, FaultyServer) else server
    settings = ServerParameters(**{"address": addresses, "timeout": 5.0, "retries": 2, "requests": 2, **changes})
    results = {}
    with connected(settings) as servers_there:
        served = servers_there.look()
        bodies = ((number, lambda number=number: json.dumps({"number": number}).encode()) for number in range(count))
        for part in servers_there.answers(bodies, served, 10, known):
            results.update({n: str(one) if isinstance(one, NotAnsweredError) else one.text for n, one in part})
    return results


def by_number(replies):
    """Replies for questions by number; `a dog` for all others. A list is used up, and its last one stays."""
    left = {number: list(listed) for number, listed in replies.items()}

    def reply(body):
        listed = left.get(body["number"], [Reply()])
        return listed.pop(0) if len(listed) > 1 else listed[0]

    return reply


def test_what_passes_is_asked_again_and_reported_once(caplog):
    busy = Reply(status=429, headers={"Retry-After": "0"})
    replies = {0: [busy, Reply("a cat")], 1: [Reply(status=503), Reply(breaks=True), Reply(breaks=True), Reply()]}
    with FaultyServer(by_number(replies)) as server:
        assert ask(server, 4) == {0: "a cat", 1: "a dog", 2: "a dog", 3: "a dog"}
    (warning,) = caplog.messages
    assert warning.startswith(f"{server.address}: HTTP ")


def test_a_server_may_ask_for_a_pause():
    with FaultyServer(by_number({0: [Reply(status=429, headers={"Retry-After": "1"}), Reply()]})) as server:
        started = time.monotonic()
        assert ask(server, 1) == {0: "a dog"}
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (
            Reply(status=400, body=b'{"error": {"message": "too\\nmany pixels"}}'),
            "refuses it, HTTP 400: too many pixels",
        ),
        (Reply(status=422, body=b'{"detail": "no"}'), "HTTP 422: no"),
        (Reply(body=b"<html>Welcome</html>"), "not one of the protocol: <html>Welcome</html>"),
        (Reply(body=b'{"choices": []}'), "not one of the protocol"),
        (Reply(body=b"[" * 100_000), "not one of the protocol"),
        (Reply(body=b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "not one of the protocol"),
        (Reply(body=b"x" * (2**20 + 1)), "more than 1048576 bytes"),
        (Reply(" \n"), "the server's answer is empty"),
        (Reply(written=11), "wrote 11 tokens; at most 10 were asked for"),
        (Reply(finish="content_filter"), "ended its answer with content_filter"),
    ],
)
def test_a_question_that_fails_alone_has_a_reason(reply, reason):
    with FaultyServer(by_number({1: [reply]})) as server:
        results = ask(server)
    assert results[0] == results[2] == "a dog"
    assert reason in results[1]


def test_a_question_that_the_server_never_answers_ends_alone():
    with FaultyServer(by_number({0: [Reply(status=500)]})) as server:
        results = ask(server, 40)
    assert results.pop(0).startswith("the server answered others meanwhile, but not this one: HTTP 500")
    assert set(results.values()) == {"a dog"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(pause=3), "gave no answer after 2 attempts: no answer in time"),
        (Reply(pause=0.1, drips=True), "no answer in time"),
        (Reply(breaks=True), "gave no answer after 3 attempts: RemoteProtocolError"),
        (Reply(status=500, body=b"oops"), "after 3 attempts: HTTP 500: oops"),
        (Reply(status=401), rf"wants another key \(HTTP 401.*Set {KEY}"),
        (Reply(status=404), "has no such model or path"),
        (Reply(model="another"), "asked for the model 'captions', but 'another' answered"),
    ],
)
def test_a_fault_of_the_whole_server_ends_the_asking(reply, message):
    started = time.monotonic()
    with FaultyServer(lambda _: reply) as server, pytest.raises(ServerError, match=message):
        ask(server, timeout=0.3)
    assert time.monotonic() - started < 5


def test_a_server_that_refuses_everything_is_not_asked_a_million_times():
    with FaultyServer(lambda _: Reply(status=400)) as server:
        refused = r"(\d+) pictures one after another have no caption; of the last, the server refu"
        with pytest.raises(ServerError, match=refused):
            ask(server, count=10**6)
        first = len(server.asked)
        assert first <= 10
        with pytest.raises(ServerError, match=refused):
            ask(server, count=10**6, known=1)
        assert 100 <= len(server.asked) - first <= 110


def test_a_dead_server_is_one_message():
    with pytest.raises(ServerError, match=r"No server answers at http://127.0.0.1:\d+/v1. Start it, and check"):
        ask(f"http://127.0.0.1:{free_port()}/v1")


def test_a_redirect_is_not_followed_and_no_key_goes_elsewhere(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(masking, "_remembered", set())
    with FaultyServer() as elsewhere:
        leads = Reply(status=307, headers={"Location": f"{elsewhere.address}/chat/completions"})
        with FaultyServer(lambda _: leads) as server, pytest.raises(ServerError, match="leads elsewhere") as told:
            ask(server)
        assert elsewhere.keys == []
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in str(told.value)


def test_a_key_that_a_server_repeats_is_masked(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(masking, "_remembered", set())
    wrong = Reply(status=401, body=json.dumps({"error": {"message": f"{SECRET} is not known"}}).encode())
    with FaultyServer(lambda _: wrong) as server, pytest.raises(ServerError, match=r"\*\*\* is not known"):
        ask(server)


def test_proxies_of_the_environment_do_not_see_what_goes_to_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with FaultyServer() as server:
        assert ask(server, 1) == {0: "a dog"}


def test_of_equal_servers_one_may_die(caplog):
    asked = itertools.count()
    with FaultyServer() as alive, FaultyServer(lambda _: Reply(breaks=next(asked) > 3)) as dying:
        results = ask([dying.address, alive.address], 40)
    assert set(results.values()) == {"a dog"}
    assert len(results) == 40
    assert [message.split(": ")[0] for message in caplog.messages] == [dying.address]


def test_a_server_that_is_dead_at_the_start_gets_nothing_and_is_reported(caplog):
    dead = f"http://127.0.0.1:{free_port()}/v1"
    with FaultyServer() as alive:
        assert len(ask([dead, alive.address], 6)) == 6
    assert [message.split(": ")[0] for message in caplog.messages] == [dead]


def test_servers_of_different_models_are_refused():
    told = pytest.raises(ServerError, match=r"are not equal: .*: a \(vllm\); .*: b \(vllm\)")
    with FaultyServer(models=["a"]) as one, FaultyServer(models=["b"]) as other, told:
        ask([one.address, other.address])


def test_the_model_must_be_clear_and_there():
    with FaultyServer(models=["a", "b"]) as server:
        with pytest.raises(ServerError, match=r"serves 2 models: a, b. Set inference.server.model"):
            ask(server)
        with pytest.raises(ServerError, match=r"serves no model 'c'; it has a, b"):
            ask(server, model="c")


def test_a_dated_name_of_the_same_model_is_accepted():
    with FaultyServer(lambda _: Reply(model="captions-2026-11-30"), owner="somebody") as server:
        assert ask(server, 1) == {0: "a dog"}


def test_as_many_questions_wait_at_each_server_as_the_settings_say():
    drawn, three_wait = itertools.count(), threading.Barrier(3)

    def reply(_):
        three_wait.wait(timeout=60)
        return Reply()

    with FaultyServer(reply) as server:
        settings = ServerParameters(address=server.address, requests=3)
        with connected(settings) as there:
            bodies = ((next(drawn), lambda: b'{"number": 0}') for _ in range(60))
            for part in there.answers(bodies, there.look(), 10, 0):
                assert len(part) <= 3
                assert next(drawn) <= len(server.asked) * 2 + 6  # questions are made as answers come
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.com/v1", "would send pictures unencrypted to another machine"),
        ("http://10.0.0.7:8000/v1", "unencrypted"),
        ("http://127.0.0.1.example.com/v1", "unencrypted"),
        ("http://127.0.0.1@example.com/v1", "may not contain a user"),
        ("https://me:secret@example.com/v1", "^(?!.*secret).*https://example.com: an address may not contain a user"),
        ("https://example.com/v1?key=1", "a query"),
        ("ftp://127.0.0.1/v1", "expected an address such as"),
        ("127.0.0.1:8000", "expected an address such as"),
        ("http://127.0.0.1:99999/v1", "expected an address such as"),
        (["http://127.0.0.1/v1", "http://example.com/v1"], "unencrypted"),
    ],
)
def test_an_address_that_is_not_safe_is_refused(address, message):
    with pytest.raises(ValidationError) as refused:
        ServerParameters(address=address)
    said = refused.value.errors()[0]["ctx"]["error"]
    assert re.search(message, str(said))


@pytest.mark.parametrize(
    "address", ["http://localhost:8000/v1", "http://[::1]:8000/v1/", "https://example.com/v1", "http://127.3.2.1"]
)
def test_loopback_and_https_are_accepted(address):
    assert ServerParameters(address=address).addresses == (address.rstrip("/"),)


def test_plain_http_elsewhere_can_be_allowed():
    assert ServerParameters(address="http://10.0.0.7:8000/v1", allow_http=True).addresses
