"""What processes on several machines tell each other while they work: torch's key-value store, with our keys."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.exceptions import LauncherError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

_ANSWER = timedelta(seconds=60)
"""Longest wait for the store's own answer."""


@dataclass(frozen=True)
class Address:
    """Where the store listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT`, checked by the parameters or the command line."""
        host, _, port = text.rpartition(":")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Board:
    """One store. The run's own process holds it; every other process is its client."""

    def __init__(self, store: TCPStore, address: Address) -> None:
        self.store: TCPStore = store
        self.address = address

    @classmethod
    def hold(cls, address: Address | None = None) -> Board:
        """A store in this process: at `address` for other machines, or on any free port for this machine alone.

        Raises:
            LauncherError: if the port is taken.
        """
        from torch._C._distributed_c10d import TCPStore

        here = ("127.0.0.1", 0) if address is None else ("", address.port)
        try:
            listener = socket.create_server(here, backlog=128)
        except OSError as error:
            raise LauncherError(
                f"launcher.rdzv_endpoint {address}: nothing can listen on port {here[1]} of this machine "
                f"({error.strerror}). Another run may use it; give a free port."
            ) from error
        port = listener.getsockname()[1]
        address = address or Address("127.0.0.1", port)
        store = TCPStore(
            "127.0.0.1",
            port,
            None,
            True,
            _ANSWER,
            wait_for_workers=False,
            multi_tenant=True,  # torch's launcher opens it once more
            master_listen_fd=listener.detach(),
        )
        return cls(store, address)

    @classmethod
    def join(cls, address: Address, timeout: float = 60) -> Board:
        """A client of the store at `address`.

        Raises:
            LauncherError: if nobody listens there in time.
        """
        from torch._C._distributed_c10d import TCPStore

        _wait_for_listener(address, timeout)
        return cls(TCPStore(address.host, address.port, None, False, _ANSWER, wait_for_workers=False), address)

    def tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """What was told under `key`, or None."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def count(self, key: str, more: int = 0) -> int:
        """A counter that all processes share, after adding `more`."""
        return int(self.store.add(key, more))

    def part(self, prefix: str) -> Store:
        """The same store for torch's own use; its keys do not meet ours."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(prefix, self.store)


def _wait_for_listener(address: Address, timeout: float) -> None:
    """torch's own waiting prints a stack for every attempt."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address.host, address.port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise LauncherError(
                    f"Nobody listens at {address} after {timeout:.0f} s ({error}). Start the run there with "
                    "launcher.rdzv_endpoint set to this address, or wait longer: --timeout."
                ) from error
        time.sleep(0.5)
