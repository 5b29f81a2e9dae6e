"""A client of OpenAI's chat protocol that asks equal servers many questions at once.

Each answer is bounded in time and bytes. What passes (a dead connection, 429, 5xx) is asked again, what concerns one
question alone is its `NotAnsweredError`, and what concerns the server ends the asking with a `ServerError`. Knows
messages and answers; pictures, prompts and adapters are `served`'s.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx2
from anyio.from_thread import BlockingPortal, start_blocking_portal

from qwen_vl_lora.exceptions import ServerError
from qwen_vl_lora.inference_parameters import KEY, ChatServerParameters, ServerKind, is_loopback
from qwen_vl_lora.runs.masking import mask_text, remember
from qwen_vl_lora.texts import visible_line

logger = logging.getLogger(__name__)

Name = TypeVar("Name")

MAX_ANSWER = 2**20
"""Bytes; a longer answer is not read to its end. 32,768 tokens have about 150,000."""

_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_WAIT = 0.5, 30.0, 60.0  # seconds; the last is the most that a server may ask for
_MOST_TIMEOUTS = 2
"""Of one question: what took too long once will take as long again."""

_FAILED_AT_FIRST, _FAILED_IN_A_ROW = 8, 100
"""Questions without an answer, one after another, that end the asking: before the first answer, and later."""

_KINDS: dict[str, ServerKind] = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp"}
"""`owned_by` of a model in a server's list → kind."""


class NotAnsweredError(Exception):
    """One question has no answer; others may have. Its text is a reason in one line."""


class Answer(NamedTuple):
    """What a server wrote.

    Attributes:
        finish: why it ended, by the protocol: `stop`, `length`, …; empty if the server does not say.
        prompt_tokens, written_tokens: as the server counts them; None if it does not.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    written_tokens: int | None


@dataclass(frozen=True)
class Served:
    """What the servers are.

    Attributes:
        model: name to ask for.
        says: what each server says of itself, by address: the entry of its list of models.
    """

    kind: ServerKind
    model: str
    says: dict[str, Any]


class Servers(Generic[Name]):
    """Equal servers behind one list of addresses. Made by `connected`."""

    def __init__(self, server: ChatServerParameters, portal: BlockingPortal, http: httpx2.AsyncClient) -> None:
        self._server = server
        self._portal = portal
        self._http = http
        self._resting = dict.fromkeys(server.addresses, 0.0)
        self._asked = dict.fromkeys(server.addresses, 0)
        self._faults = dict.fromkeys(server.addresses, 0)
        self._answered = 0
        self._reported: set[str] = set()

    def look(self) -> Served:
        """Kind and model of the servers, by their own word where the settings leave it open.

        Raises:
            ServerError: if none answers, one refuses, they differ, or the model is not clear.
        """
        found: dict[str, tuple[ServerKind, str, Any]] = {}
        for address in self._server.addresses:
            try:
                found[address] = self._portal.call(self._look_at, address)
            except (httpx2.TransportError, TimeoutError, _TooLongError) as fault:
                self._report(address, f"does not answer ({_in_words(fault)}): it gets no pictures until it does")
        if not found:
            raise ServerError(
                f"No server answers at {', '.join(self._server.addresses)}. Start it, and check "
                f"{self._server.block}.address with its port and path, usually /v1. Finished captions are kept."
            )
        if len({(kind, model) for kind, model, _ in found.values()}) > 1:
            told = "; ".join(f"{address}: {model} ({kind})" for address, (kind, model, _) in found.items())
            raise ServerError(
                f"The servers of {self._server.block}.address are not equal: {told}. List equal ones alone."
            )
        kind, model, _ = next(iter(found.values()))
        return Served(kind, model, {address: says for address, (_, _, says) in found.items()})

    def answers(
        self, questions: Iterable[tuple[Name, Callable[[], bytes]]], served: Served, most_tokens: int, known: int
    ) -> Iterator[list[tuple[Name, Answer | NotAnsweredError]]]:
        """Ask all questions, a bounded number at once, and yield what is answered as it comes.

        Args:
            questions: a name, and a function that makes the body of the request in a thread of its own.
            most_tokens: that an answer may have.
            known: number of questions that were answered before.

        Raises:
            ServerError: if the servers are gone or refuse; what was answered by then was yielded.
        """
        waiting: dict[Future[Answer], Name] = {}
        coming = iter(questions)
        failed, fatal = 0, None
        while fatal is None:
            while len(waiting) < self._server.requests * len(self._resting) and (question := next(coming, None)):
                waiting[self._portal.start_task_soon(self._ask, question[1], served, most_tokens)] = question[0]
            if not waiting:
                return
            results: list[tuple[Name, Answer | NotAnsweredError]] = []
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                name, fault = waiting.pop(future), future.exception()
                if fault is None:
                    results.append((name, future.result()))
                    known, failed = known + 1, 0
                elif isinstance(fault, NotAnsweredError):
                    results.append((name, fault))
                    failed += 1
                    if failed >= (_FAILED_IN_A_ROW if known else _FAILED_AT_FIRST):
                        fatal = _refuses_all(failed, fault)
                elif isinstance(fault, ServerError):
                    fatal = fault
                else:
                    raise fault
            yield results
        raise fatal

    async def _look_at(self, address: str) -> tuple[ServerKind, str, Any]:
        status, _, data = await self._send("GET", f"{address}/models", None)
        self._check_status(address, status, data, {404})
        listed = _list_of_models(data) if status == 200 else []
        kind = self._server.kind
        if kind == "auto":
            kind = next((_KINDS[owner] for entry in listed if (owner := str(entry.get("owned_by"))) in _KINDS), "auto")
        if kind == "auto":
            status, _, data = await self._send("GET", f"{address.removesuffix('/v1')}/openapi.json", None)
            kind = "transformers" if status == 200 and b'"/load_model"' in data else "openai"
        names = [str(entry["id"]) for entry in listed]
        model = self._server.model
        if kind == "transformers":  # lists what is in a cache, not what it serves
            model = model or await self._name_of_only(address)
            return kind, model, next((entry for entry in listed if entry["id"] == model), None)
        if model is None and len(names) != 1:
            raise ServerError(
                f"{address} serves {len(names)} models: {_shown(names)}. Set {self._server.block}.model to the name of "
                "one."
            )
        model = model or names[0]
        if names and model not in names:
            raise ServerError(
                f"{address} serves no model {model!r}; it has {_shown(names)}. Set {self._server.block}.model to one "
                "of them."
            )
        return kind, model, next((entry for entry in listed if entry["id"] == model), None)

    async def _name_of_only(self, address: str) -> str:
        """Name of the model that a server was started with, which it tells in an answer only."""
        question = {"max_tokens": 1, "messages": [{"role": "user", "content": "."}]}
        status, _, data = await self._send("POST", f"{address}/chat/completions", json.dumps(question).encode())
        try:
            return str(json.loads(data)["model"]).removesuffix("@main")
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{address} does not say which model it serves (HTTP {status}). Set {self._server.block}.model to the "
                "name or directory that it was started with."
            ) from error

    async def _ask(self, make: Callable[[], bytes], served: Served, most_tokens: int) -> Answer:
        body = await anyio.to_thread.run_sync(make)
        before, timeouts = self._answered, 0
        for attempt in range(self._server.retries + 1):
            address = min(self._resting, key=lambda one: (self._resting[one] > time.monotonic(), self._asked[one]))
            asked_for: float = 0
            self._asked[address] += 1
            try:
                status, headers, data = await self._send("POST", f"{address}/chat/completions", body)
                self._check_status(address, status, data, set())
                if status == 200:
                    answer = read_answer(address, data, served.model, most_tokens)
                    self._answered += 1
                    self._faults[address] = 0
                    return answer
                said = f"HTTP {status}{_said(data)}"
                if status not in _PASSING:
                    raise NotAnsweredError(f"the server refuses it, {said}")
                asked_for = _seconds(headers.get("retry-after"))
            except _TooLongError as fault:
                raise NotAnsweredError(f"the server's answer has more than {MAX_ANSWER} bytes") from fault
            except (httpx2.TransportError, TimeoutError) as fault:
                timeouts += isinstance(fault, (TimeoutError, httpx2.TimeoutException))
                said = _in_words(fault)
            finally:
                self._asked[address] -= 1
            if attempt == self._server.retries or timeouts == _MOST_TIMEOUTS:
                break
            self._report(address, f"{said}; asking again, up to {self._server.retries} times")
            # A server rests the longer the more faults it had in a row; meanwhile the others are asked.
            rest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(self._faults[address], 10))
            self._faults[address] += 1
            self._resting[address] = time.monotonic() + max(asked_for, rest * random.uniform(0.75, 1.25))
            if min(self._resting.values()) > time.monotonic():
                pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt) * random.uniform(0.75, 1.25)
                await anyio.sleep(max(asked_for, pause))
        if self._answered > before:
            raise NotAnsweredError(f"the server answered others meanwhile, but not this one: {said}")
        raise ServerError(
            f"{address} gave no answer after {attempt + 1} attempts: {said}. Finished captions are kept: start the "
            "server again, and run the same command. If it is only slow: a longer "
            f"{self._server.block}.timeout, or fewer {self._server.block}.requests."
        )

    async def _send(self, method: str, url: str, body: bytes | None) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body. The deadline covers all, and a longer body than `MAX_ANSWER` is not read on."""
        with anyio.fail_after(self._server.timeout):
            try:
                return await self._send_once(method, url, body)
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
                return await self._send_once(method, url, body)  # the server had closed a connection that was kept

    async def _send_once(self, method: str, url: str, body: bytes | None) -> tuple[int, httpx2.Headers, bytes]:
        headers = {"Content-Type": "application/json"} if body else None
        data = bytearray()
        async with self._http.stream(method, url, content=body, headers=headers) as response:
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > MAX_ANSWER:
                    raise _TooLongError
            return response.status_code, response.headers, bytes(data)

    def _check_status(self, address: str, status: int, data: bytes, allowed: set[int]) -> None:
        """Raises: ServerError for a status that all questions would get."""
        if status in allowed:
            return
        if 300 <= status < 400:
            raise ServerError(
                f"{address} leads elsewhere (HTTP {status}), where neither pictures nor a key are sent. Set "
                f"{self._server.block}.address to the address that it leads to, if you trust that one."
            )
        if status in (401, 403):
            raise ServerError(
                f"{address} wants another key (HTTP {status}{_said(data)}). Set {KEY} in the environment."
            )
        if status == 404:
            raise ServerError(
                f"{address} has no such model or path (HTTP 404{_said(data)}). Check {self._server.block}.model, and "
                f"the path in {self._server.block}.address, usually /v1."
            )

    def _report(self, address: str, said: str) -> None:
        """Log a fault of a server, the first time."""
        if address not in self._reported:
            self._reported.add(address)
            logger.warning("%s: %s.", address, said)


class _TooLongError(Exception):
    pass


@contextmanager
def connected(server: ChatServerParameters) -> Iterator[Servers[Any]]:
    """The servers of the settings. Requests run beside the caller; Ctrl-C ends them.

    The environment's proxies are used for other machines only. The key is in the environment only.
    """
    key = os.environ.get(KEY, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise ServerError(f"{KEY} contains characters that a key cannot have. Set it again.")
    remember({KEY: key})  # a server may repeat it in a message
    http = httpx2.AsyncClient(
        headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
        timeout=httpx2.Timeout(server.timeout),
        limits=httpx2.Limits(max_connections=None),
        trust_env=not any(is_loopback(urlsplit(address).hostname or "") for address in server.addresses),
        follow_redirects=False,
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(http):
        yield Servers(server, portal, http)


def read_answer(address: str, data: bytes, model: str, most_tokens: int) -> Answer:
    """Read a response of the protocol.

    Raises:
        NotAnsweredError: if it is none, or has no text, or more tokens than were asked for.
        ServerError: if another model wrote it.
    """
    try:
        content = json.loads(data)
        choice = content["choices"][0]
        text, finish, usage = (
            choice["message"]["content"] or "",
            choice.get("finish_reason"),
            content.get("usage") or {},
        )
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        text.encode()
        writer = content.get("model")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise NotAnsweredError(f"the server's answer is not one of the protocol{_said(data)}") from error
    prompt_tokens, written = (count if type(count) is int else None for count in counts)
    if writer is not None and not re.fullmatch(rf"{re.escape(model)}(@.+|-\d{{4}}-?\d\d-?\d\d)?", str(writer)):
        raise ServerError(
            f"{address} was asked for the model {model!r}, but {str(writer)[:200]!r} answered. Set the key `model` of "
            "its block to that name if it is the right one."
        )
    if written is not None and written > most_tokens:
        raise NotAnsweredError(f"the server wrote {written} tokens; at most {most_tokens} were asked for")
    if finish not in (None, "stop", "length"):
        raise NotAnsweredError(f"the server ended its answer with {visible_line(str(finish)[:100])}")
    if not text.strip():
        raise NotAnsweredError("the server's answer is empty")
    return Answer(text.strip(), finish or "", prompt_tokens, written)


def _refuses_all(failed: int, last: NotAnsweredError) -> ServerError:
    return ServerError(
        f"{failed} pictures one after another have no caption; of the last, {last}. Check that the server serves a "
        "model that sees pictures. Finished captions are kept."
    )


def _list_of_models(data: bytes) -> list[dict[str, Any]]:
    try:
        entries = json.loads(data)["data"]
        return [entry for entry in entries if isinstance(entry["id"], str)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _shown(names: list[str]) -> str:
    shown = ", ".join(visible_line(name[:100]) for name in names[:10])
    return f"{shown or 'none in its list'}{', …' if len(names) > 10 else ''}"


def _said(data: bytes) -> str:
    """What a server says of a fault, in one line: `: …`."""
    try:
        content = json.loads(data)
        fault = content.get("error") or content.get("detail") or content.get("message") or content
        said = fault.get("message") if isinstance(fault, dict) and fault.get("message") else fault
    except (ValueError, AttributeError, RecursionError):
        said = data[:1000].decode(errors="replace")
    line = mask_text(" ".join(str(said).split()))
    return f": {visible_line(line[:200])}" if line else ""


def _seconds(retry_after: str | None) -> float:
    """The pause that a server asks for, as far as it is reasonable."""
    return min(float(retry_after), _LONGEST_WAIT) if retry_after and re.fullmatch(r"\d{1,9}", retry_after) else 0


def _in_words(fault: BaseException) -> str:
    if isinstance(fault, (TimeoutError, httpx2.TimeoutException)):
        return "no answer in time"
    if isinstance(fault, _TooLongError):
        return "an answer without an end"
    said = visible_line(str(fault)[:200]).rstrip(".")
    return f"{type(fault).__name__}: {said}" if said else type(fault).__name__
