"""
The client library: :class:`Sandbox`, whose methods block, and :class:`AsyncSandbox`, for asyncio.

It needs the extra ``client``. The classes are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NoSpace,
    NotFound,
    PreconditionFailed,
    ProtocolError,
    SandboxError,
    SandboxGone,
    ServerFault,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from sandboxd.client.outcome import CommandFailed, CommandTimeout

if TYPE_CHECKING:
    from sandboxd.client.asynchronous import AsyncSandbox
    from sandboxd.client.blocking import Sandbox

__all__ = [
    "AsyncSandbox",
    "BadRequest",
    "CommandFailed",
    "CommandTimeout",
    "Conflict",
    "Forbidden",
    "NoSpace",
    "NotFound",
    "PreconditionFailed",
    "ProtocolError",
    "Sandbox",
    "SandboxError",
    "SandboxGone",
    "ServerFault",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
]


def __getattr__(name: str) -> object:
    # Each client imports its own half of the HTTP and WebSocket libraries; a program needs one of them.
    if name == "Sandbox":
        from sandboxd.client.blocking import Sandbox

        return Sandbox
    if name == "AsyncSandbox":
        from sandboxd.client.asynchronous import AsyncSandbox

        return AsyncSandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
