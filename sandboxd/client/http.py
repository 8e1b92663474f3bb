"""The use of httpx that the blocking and the asyncio client share."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sandboxd.client.errors import SandboxError
from sandboxd.client.flow import ConnectionLost, HttpResponse

if TYPE_CHECKING:
    import ssl

    import httpx
else:
    # httpx imports its own command line if it can, and with it rich and click: half of the time that the import takes.
    _blocked = "httpx" not in sys.modules and "httpx._main" not in sys.modules
    if _blocked:
        sys.modules["httpx._main"] = None
    try:
        import httpx
    finally:
        if _blocked:
            del sys.modules["httpx._main"]

__all__ = ["ASYNC_EXTENSIONS", "EXTENSIONS", "auth_headers", "check_url", "head", "httpx", "lost", "timeouts", "verify"]

#: Seconds to wait for a connection.
CONNECT = 10.0

#: Socket options with which the kernel notices within about two minutes that the host of a silent peer has vanished.
#: TCP_KEEPALIVE is the name of TCP_KEEPIDLE in macOS.
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

#: A valid token, RFC 6750.
_TOKEN = re.compile(r"[\x21-\x7e]+")


def check_url(url: str) -> str:
    """
    Return the URL of a sandbox without a slash at its end.

    :raise ValueError: if it is not one.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("the URL has a user or a password in it; give the secret apart from it")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the URL of a sandbox; give one such as http://127.0.0.1:3030")
    return url.rstrip("/")


def auth_headers(secret: str | None) -> dict[str, str]:
    """
    Return the headers that every request has.

    :raise ValueError: if the secret cannot be sent. It is not in the message.
    """
    headers = {"Prefer": "handling=strict", "Accept-Encoding": "identity"}
    if secret is not None:
        if not _TOKEN.fullmatch(secret):
            raise ValueError("the secret is empty, or has characters in it that no token has")
        headers["Authorization"] = f"Bearer {secret}"
    return headers


def verify(url: str) -> ssl.SSLContext | bool:
    """
    Return the TLS verification of a sandbox's certificate. To load the authorities takes long, so it is done once.
    """
    return httpx.create_ssl_context() if url.startswith("https:") else False


def timeouts(seconds: float | None) -> httpx.Timeout:
    """Return httpx's timeouts for a request that may be silent for this many seconds."""
    return httpx.Timeout(seconds, connect=CONNECT, pool=None)


def _keep_alive(event: str, info: Mapping[str, Any]) -> None:
    """Turn keep-alive on for a new connection. Without it, a reply is awaited for ever if the host has vanished."""
    if not event.endswith(".connect_tcp.complete"):
        return
    connection: socket.socket = info["return_value"].get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _async_keep_alive(event: str, info: Mapping[str, Any]) -> None:
    _keep_alive(event, info)


#: The extensions of each request. Socket options would need a transport of our own, for which httpx does not look for
#: proxies in the environment; its trace hook sees the connections to them, too.
EXTENSIONS = {"trace": _keep_alive}
ASYNC_EXTENSIONS = {"trace": _async_keep_alive}


def head(response: httpx.Response) -> HttpResponse:
    """Return the head of a response."""
    return HttpResponse(response.status_code, {name.lower(): value for name, value in response.headers.items()})


def lost(error: httpx.TransportError, url: str) -> SandboxError:
    """Return the client's exception for a failure of the connection."""
    sent = not isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
    what = "the connection was lost" if sent else "cannot be reached"
    if isinstance(error, httpx.ReadTimeout):
        what = "does not answer in time"
    return ConnectionLost(f"{url}: {what}: {str(error) or type(error).__name__}", sent)
