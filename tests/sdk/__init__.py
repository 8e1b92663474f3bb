"""The official Python SDK against the real daemon, without Koyeb's control plane."""

from __future__ import annotations

import asyncio
import functools
import inspect
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

from koyeb.sandbox import Sandbox
from koyeb.sandbox.executor_client import ConnectionInfo

from tests.daemon import Daemon, alive

#: What the SDK says a port is exposed at: only the control plane knows the real address.
PUBLIC_URL = "https://sandbox.example"
#: Characters at which some clients split lines although they are no line ends, and others beyond ASCII.
TEXT = "é€😀\x85\u2028\u2029\x0b\x0c\x1c"
BINARY = bytes(range(256))


def connection(daemon: Daemon, prefix: str = "", secret: str | None = None) -> ConnectionInfo:
    """How to reach the daemon."""
    return ConnectionInfo(public_url=daemon.url + prefix, routing_key=None, secret=secret or daemon.secret)


def bound_to(daemon: Daemon, kind: type[Sandbox]) -> Any:
    """A sandbox handle that has asked the control plane already, and was told of this daemon."""
    sandbox = kind("id", "app", "service", sandbox_secret=daemon.secret)
    sandbox._sandbox_url = (f"{daemon.url}/koyeb-sandbox", None)
    sandbox._url = PUBLIC_URL
    return sandbox


def in_asyncio(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test in asyncio, the SDK's event loop; without this it would run in the reactor."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    run.__signature__ = inspect.signature(test)
    del run.__wrapped__
    return run


def wait_until_gone(pid: int, seconds: float = 5) -> None:
    """Return when a process has ended."""
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def listen() -> socket.socket:
    """A service inside the sandbox."""
    service = socket.create_server(("127.0.0.1", 0))
    service.settimeout(5)
    return service


def exchange(proxy_port: int, service: socket.socket) -> tuple[bytes, bytes]:
    """What the service and then its client receive, through the proxy, of "ping" and "pong"."""
    with socket.create_connection(("127.0.0.1", proxy_port), 5) as outside:
        inside, _ = service.accept()
        with inside:
            inside.settimeout(5)
            outside.sendall(b"ping")
            request = inside.recv(100)
            inside.sendall(b"pong")
            return request, outside.recv(100)


def is_closed_at_once(proxy_port: int) -> bool:
    """Whether the proxy accepts a connection and closes it, as it does when no port is bound."""
    with socket.create_connection(("127.0.0.1", proxy_port), 5) as outside:
        return outside.recv(100) == b""
