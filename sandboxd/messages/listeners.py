"""Bodies and replies of the routes about listening ports."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandboxd.messages.decoding import Seconds, Struct

PortNumber = Annotated[int, Meta(ge=1, le=65535)]

#: The path that an HTTP probe requests: printable ASCII, as it is sent in the request line.
HttpPath = Annotated[
    str, Meta(pattern=r"^/[!-~]*$(?!\n)", description="A path, with its query; answered with 2xx or 3xx.")
]


class PortWaitRequest(msgspec.Struct):
    """Body of ``/ports/wait``."""

    port: PortNumber
    http: HttpPath | None = None
    timeout: Annotated[Seconds, Meta(description="Seconds to wait, at most; without it, for ever.")] | None = None


class PortWaited(Struct):
    """Whether a port is ready, and how that was found."""

    ready: bool
    reason: Literal["port", "http", "timeout"]


class ListeningPort(Struct):
    """A TCP port that a process listens on."""

    port: PortNumber
    addresses: Annotated[list[str], Meta(description="Where: 0.0.0.0 and :: are all of this machine's.")]
    pid: Annotated[int | None, Meta(description="The process that holds it; null if that cannot be seen.")]
    execution: Annotated[str | None, Meta(description="The id of the execution which that belongs to.")]
    bound: Annotated[bool, Meta(description="Whether the proxy forwards to it.")]


class ListeningPorts(Struct):
    """The TCP ports that processes listen on, without the daemon's own."""

    ports: list[ListeningPort]
