"""Pictures by address, fetched so that neither the address nor its server can do harm.

https only, listed hosts only, no private address after the name was resolved, each redirect judged
like the first address, and the connection goes to the very address that was judged. One deadline
covers resolving, redirects, retries and reading. Proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from qwen_vl_lora.exceptions import DataFormatError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_Result = TypeVar("_Result")

MAX_REDIRECTS = 5
MAX_ATTEMPTS = 3
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; doubled before the third."""

CHUNK = 64 * 1024
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

_SENT_AS_IT_IS = "!#$%&'()*+,/:;=?@[]|~"
"""Beside letters and digits; all else is percent-encoded, as browsers do: a request line is ASCII without blanks."""


class FetchError(DataFormatError):
    """A picture that was not fetched: `refused` by our rules, `too_large`, or `failed` on the way."""

    def __init__(self, kind: Literal["refused", "too_large", "failed"], detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class _PassingFaultError(Exception):
    """A fault that may pass: a broken connection, or a server that is busy."""


def resolve_host(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system resolves it."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: IPAddress) -> bool:
    """Whether an address belongs to the open internet, also as what it stands for inside IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


class Fetcher:
    """Fetches pictures from listed hosts. May be used by several threads."""

    def __init__(
        self,
        hosts: Iterable[str],
        timeout: float,
        max_bytes: int,
        *,
        trusted_origins: Iterable[str] = (),
        resolve: Callable[[str, int], list[str]] = resolve_host,
        allows: Callable[[IPAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take what may be fetched and how long it may take.

        Args:
            hosts: names that may be asked, `name` for port 443 or `name:port`. `http` addresses on
                them are asked for by `https`.
            timeout: seconds for one picture, from resolving its host to its last byte.
            max_bytes: a longer answer is refused as soon as it is known to be.
            trusted_origins: `scheme://host:port` of servers that the user named himself, such as the
                hub: asked as they are, by plain http and in a private network too.
            resolve, allows, tls: how a host becomes addresses, which of them may be asked, and whose
                certificates count. The defaults are the rules; a test gives its own loopback server.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._trusted = frozenset(origin.lower().rstrip("/") for origin in trusted_origins)
        self._resolve = resolve
        self._allows = allows
        self._tls = tls or ssl.create_default_context()

    def fetch(self, address: str) -> bytes:
        """Return the bytes behind an address.

        Raises:
            FetchError: with the reason.
        """
        deadline = time.monotonic() + self._timeout
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return self._follow(address, deadline)
            except _PassingFaultError as fault:
                pause = FIRST_PAUSE * 2 ** (attempt - 1)
                if attempt == MAX_ATTEMPTS or time.monotonic() + pause >= deadline:
                    raise FetchError("failed", f"It could not be fetched in {attempt} attempts: {fault}.") from fault
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _follow(self, address: str, deadline: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            target = self._judge(address)
            connection = self._connect(target, deadline)
            try:
                with self._ask(connection, target) as answer:
                    if answer.status not in (301, 302, 303, 307, 308):
                        return self._read(answer, deadline, connection)
                    address = urljoin(target.geturl(), _location_of(answer))
            except (OSError, http.client.HTTPException) as error:
                raise _PassingFaultError(_said(error)) from error
            except FetchError:
                raise
            except ValueError as error:  # an address that cannot be sent, or one in an answer that cannot be read
                raise FetchError(
                    "failed", f"It, or what it is redirected to, is no address: {_said(error)}."
                ) from error
            finally:
                connection.close()
        raise FetchError("failed", f"It is redirected more than {MAX_REDIRECTS} times.")

    def _judge(self, address: str) -> SplitResult:
        """Decide from the text alone whether an address may be asked, and by which scheme."""
        try:
            split = urlsplit(address)
            host, port = (split.hostname or "").lower(), split.port
        except ValueError as error:
            raise FetchError("refused", f"The address cannot be read: {error}.") from error
        if split.scheme not in ("http", "https") or not host or split.username or split.password:
            raise FetchError("refused", "Only https addresses without user and password are fetched.")
        if _origin(split) in self._trusted:
            return split
        plain = port in (None, 443) or (port == 80 and split.scheme == "http")
        listed = {host, f"{host}:443"} if plain else {f"{host}:{port}"}
        if not listed & self._hosts:
            raise FetchError(
                "refused",
                f"The host {min(listed)} may not be asked; allowed: {', '.join(sorted(self._hosts)) or 'none'}. "
                "To allow it, add it to image.url_hosts.",
            )
        netloc = split.netloc.removesuffix(":80") if split.scheme == "http" else split.netloc
        return split._replace(scheme="https", netloc=netloc)

    def _connect(self, target: SplitResult, deadline: float) -> http.client.HTTPConnection:
        """Open a connection to an address of the host that was judged, and to no other."""
        host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
        found = self._addresses(host, port, deadline)
        if _origin(target) not in self._trusted:
            for address in found:
                if not self._allows(ipaddress.ip_address(address.partition("%")[0])):
                    raise FetchError("refused", f"The host {host} is {address}, which is no address of the internet.")
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port)
        connection.sock = self._open_first(found, target, port, deadline)  # so http.client opens none itself
        return connection

    def _open_first(self, found: list[str], target: SplitResult, port: int, deadline: float) -> socket.socket:
        """Connect to the first of the addresses that answers; one that is silent takes its share of the time alone."""
        host = target.hostname or ""
        faults: list[str] = []
        for number, address in enumerate(found):
            try:
                opened = socket.create_connection((address, port), timeout=_left(deadline) / (len(found) - number))
                if target.scheme == "https":
                    opened = self._tls.wrap_socket(opened, server_hostname=host)
                opened.settimeout(_left(deadline))
                return opened
            except ssl.SSLCertVerificationError as error:
                said = f"The certificate of {host} is not valid: {error.verify_message}."
                raise FetchError("failed", said) from error
            except OSError as error:
                faults.append(_said(error))
        raise _PassingFaultError("; ".join(dict.fromkeys(faults)))

    def _addresses(self, host: str, port: int, deadline: float) -> list[str]:
        try:
            found = call_within(_left(deadline), lambda: self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            raise _PassingFaultError(f"the host {host} cannot be resolved: {_said(error)}") from error
        if not found:
            raise _PassingFaultError(f"the host {host} has no address")
        return found

    def _ask(self, connection: http.client.HTTPConnection, target: SplitResult) -> http.client.HTTPResponse:
        path = target.path or "/"
        asked = f"{path}?{target.query}" if target.query else path
        connection.request(
            "GET",
            quote(asked, safe=_SENT_AS_IT_IS),
            headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "qwen-vl-lora"},
        )
        return connection.getresponse()

    def _read(self, answer: http.client.HTTPResponse, deadline: float, connection: http.client.HTTPConnection) -> bytes:
        if answer.status in _RETRIED_STATUSES:
            raise _PassingFaultError(f"the server answers {answer.status} {answer.reason}")
        if answer.status != 200:
            raise FetchError("failed", f"The server answers {answer.status} {answer.reason}.")
        parts: list[bytes] = []
        received, size = 0, answer.length or 0  # announced
        while size <= self._max_bytes:
            if connection.sock is not None:
                connection.sock.settimeout(_left(deadline))
            part = answer.read1(CHUNK)
            if not part:
                if answer.length:
                    raise _PassingFaultError(f"the connection ended {answer.length} bytes too early")
                return b"".join(parts)
            _left(deadline)
            parts.append(part)
            received += len(part)
            size = max(size, received)
        raise FetchError("too_large", f"The answer has {size} bytes or more; at most {self._max_bytes} are read.")


def call_within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """Return a function's result, or give up waiting: resolving a host knows no timeout of its own.

    Raises:
        TimeoutError: after `seconds`; the call goes on in a thread that keeps no process alive.
    """
    outcome: list[_Result] = []
    faults: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        raise faults[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return outcome[0]


def _location_of(answer: http.client.HTTPResponse) -> str:
    """Where an answer redirects to, in ASCII: http.client takes the header's bytes for Latin-1, whatever they are."""
    return quote((answer.getheader("Location") or "").strip().encode("latin-1"), safe=_SENT_AS_IT_IS)


def _origin(split: SplitResult) -> str:
    return f"{split.scheme}://{split.netloc}".lower()


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises: TimeoutError behind it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over (image.url_timeout)")
    return left


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
