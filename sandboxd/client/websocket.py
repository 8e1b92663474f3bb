"""The use of the ``websockets`` library that the blocking and the asyncio client share."""

from __future__ import annotations

import asyncio
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from sandboxd.client.attaching import REFUSALS
from sandboxd.client.errors import Conflict, SandboxError, error_of
from sandboxd.client.flow import ConnectionLost
from sandboxd.client.http import CONNECT

#: The exceptions when a WebSocket cannot be opened, or breaks. In Python 3.10 asyncio's TimeoutError is one of its own.
FAILURES = (OSError, TimeoutError, asyncio.TimeoutError, EOFError, WebSocketException)


def arguments(url: str, path: str, headers: dict[str, str], subprotocol: str) -> dict[str, Any]:
    """Return the arguments of the library's ``connect``."""
    return {
        "uri": f"ws{url.removeprefix('http')}{path}",
        "additional_headers": {name: value for name, value in headers.items() if name == "Authorization"},
        "subprotocols": [Subprotocol(subprotocol)],
        "compression": None,
        "open_timeout": CONNECT,
        "max_size": 2**21,
    }


def failure(error: BaseException, url: str) -> SandboxError:
    """Return the client's exception for a failure of a WebSocket."""
    if isinstance(error, InvalidStatus):
        return error_of(error.response.status_code, bytes(error.response.body or b""))
    if isinstance(error, ConnectionClosed):
        close = error.rcvd
        if close is not None and close.code in REFUSALS:
            return Conflict(close.reason or f"the connection was closed with code {close.code}")
        return ConnectionLost(f"{url}: the connection was lost: {error}", True)
    sent = not isinstance(error, (OSError, asyncio.TimeoutError, InvalidHandshake))
    return ConnectionLost(f"{url}: cannot be reached: {error or type(error).__name__}", sent)
