"""Downloads pictures by URL so that neither the URL nor its server can do harm.

Only https, only listed hosts, no private address after the name was resolved. Each redirect is checked
like the first URL, and the connection goes to the address that was checked. One deadline covers
resolving, redirects, retries and reading. Proxies of the environment are not used.
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
"""Allowed besides letters and digits; others are percent-encoded, since a request line is ASCII without blanks."""


class FetchError(DataFormatError):
    """A picture was not fetched: `refused` by the rules above, `too_large`, or `failed` in transfer."""

    def __init__(self, kind: Literal["refused", "too_large", "failed"], detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail


class _PassingFaultError(Exception):
    """A temporary fault: a broken connection, or a busy server."""


def resolve_host(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, resolved by the system."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: IPAddress) -> bool:
    """Whether an IP address is public, including an IPv4 address embedded in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])
        if inner:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


class Fetcher:
    """Fetches pictures from listed hosts. Thread-safe."""

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
        """Set what may be fetched and the limits for it.

        Args:
            hosts: allowed hosts, `name` for port 443 or `name:port`. `http` URLs on them are fetched
                by `https`.
            timeout: seconds for one picture, from resolving its host to its last byte.
            max_bytes: a longer response is refused as soon as its length is known.
            trusted_origins: `scheme://host:port` of servers that the user named, such as the hub: used
                as given, also by plain http and in a private network.
            resolve, allows, tls: how a host is resolved, which IP addresses are allowed, and which
                certificates are accepted. The defaults are the rules; tests pass a loopback server.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._trusted = frozenset(origin.lower().rstrip("/") for origin in trusted_origins)
        self._resolve = resolve
        self._allows = allows
        self._tls = tls or ssl.create_default_context()

    def fetch(self, address: str) -> bytes:
        """Return the bytes behind a URL.

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
                    raise FetchError("failed", f"Not fetched after {attempt} attempts: {fault}.") from fault
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
            except ValueError as error:  # a URL that cannot be sent, or a redirect target that cannot be parsed
                raise FetchError("failed", f"The URL or its redirect target is not valid: {_said(error)}.") from error
            finally:
                connection.close()
        raise FetchError("failed", f"More than {MAX_REDIRECTS} redirects.")

    def _judge(self, address: str) -> SplitResult:
        """Decide from the text of a URL whether it may be fetched, and by which scheme."""
        try:
            split = urlsplit(address)
            host, port = (split.hostname or "").lower(), split.port
        except ValueError as error:
            raise FetchError("refused", f"The URL cannot be parsed: {error}.") from error
        if split.scheme not in ("http", "https") or not host or split.username or split.password:
            raise FetchError("refused", "Only https URLs without user and password are fetched.")
        if _origin(split) in self._trusted:
            return split
        plain = port in (None, 443) or (port == 80 and split.scheme == "http")
        listed = {host, f"{host}:443"} if plain else {f"{host}:{port}"}
        if not listed & self._hosts:
            raise FetchError(
                "refused",
                f"The host {min(listed)} is not allowed; allowed: {', '.join(sorted(self._hosts)) or 'none'}. "
                "To allow it, add it to image.url_hosts.",
            )
        netloc = split.netloc.removesuffix(":80") if split.scheme == "http" else split.netloc
        return split._replace(scheme="https", netloc=netloc)

    def _connect(self, target: SplitResult, deadline: float) -> http.client.HTTPConnection:
        """Connect to an IP address of the host that was checked, and to no other."""
        host, port = target.hostname or "", target.port or (443 if target.scheme == "https" else 80)
        found = self._addresses(host, port, deadline)
        if _origin(target) not in self._trusted:
            for address in found:
                if not self._allows(ipaddress.ip_address(address.partition("%")[0])):
                    raise FetchError("refused", f"The host {host} is {address}, which is not a public address.")
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port)
        connection.sock = self._open_first(found, target, port, deadline)  # so that http.client opens none itself
        return connection

    def _open_first(self, found: list[str], target: SplitResult, port: int, deadline: float) -> socket.socket:
        """Connect to the first address that responds. A silent address uses only its share of the time."""
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
            raise _PassingFaultError(f"the server returned {answer.status} {answer.reason}")
        if answer.status != 200:
            raise FetchError("failed", f"The server returned {answer.status} {answer.reason}.")
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
        raise FetchError("too_large", f"The response has {size} bytes or more; at most {self._max_bytes} are read.")


def call_within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """Return a function's result, or stop waiting: resolving a host has no timeout of its own.

    Raises:
        TimeoutError: after `seconds`; the call continues in a daemon thread.
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
        raise TimeoutError(f"no response within {seconds:.0f} s")
    return outcome[0]


def _location_of(answer: http.client.HTTPResponse) -> str:
    """Return the redirect target in ASCII: http.client decodes header bytes as Latin-1, whatever they are."""
    return quote((answer.getheader("Location") or "").strip().encode("latin-1"), safe=_SENT_AS_IT_IS)


def _origin(split: SplitResult) -> str:
    return f"{split.scheme}://{split.netloc}".lower()


def _left(deadline: float) -> float:
    """Return the seconds until the deadline. Raises: TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out (image.url_timeout)")
    return left


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
