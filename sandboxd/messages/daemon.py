"""Bodies and replies of the routes about the daemon itself: health, port, metrics and status."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandboxd.messages.decoding import BadRequest, DoneWithMessage, Struct, Yes

#: A port, as a regular expression for the OpenAPI document.
PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"


Port = Annotated[str | int, Meta(extra_json_schema={"minimum": 1, "maximum": 65535, "pattern": f"^{PORT}$"})]


PortOrNone = Annotated[str | int, Meta(extra_json_schema={"minimum": 1, "maximum": 65535, "pattern": f"^({PORT})?$"})]


class BindPortRequest(msgspec.Struct):
    """Body of ``/bind_port``."""

    port: Port

    def number(self) -> int:
        """
        Return the port.

        :raise BadRequest: if it is not a number from 1 to 65535.
        """
        return _port(self.port)


class UnbindPortRequest(msgspec.Struct):
    """Body of ``/unbind_port``."""

    port: PortOrNone | None = None

    def number(self) -> int | None:
        """
        Return the port, or None.

        :raise BadRequest: if it is not a number from 1 to 65535.
        """
        return None if self.port in (None, "") else _port(self.port)


def _port(value: str | int) -> int:
    text = str(value).strip()
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise BadRequest(f"port: {value!r} is not a port; give a number from 1 to 65535")


PortText = Annotated[str, Meta(pattern="^[0-9]{0,5}$")]


class Health(Struct):
    """The reply of a daemon that answers."""

    status: Literal["ok"]
    version: str
    uptime: Annotated[int, Meta(ge=0, description="Seconds.")]
    proxy_port: PortText


class Bound(DoneWithMessage):
    """The port that new connections to the proxy go to from now on."""

    port: PortText


class PortStatus(Struct):
    """The port that the proxy forwards to."""

    success: Yes
    port: Annotated[PortText, Meta(description="Empty if none is bound.")]
    proxy_port: PortText


class Readiness(Struct):
    """Whether the daemon would run a command now."""

    ready: Yes


class Sample(Struct):
    """One value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Metric(Struct):
    """A metric, in Prometheus' data model."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[Sample]


class MetricsReply(Struct):
    """The daemon's metrics."""

    metrics: list[Metric]


class DaemonStatus(Struct):
    """The daemon's version, uptime and load."""

    version: str
    uptime: Annotated[float, Meta(description="Seconds.")]
    executions: Annotated[int, Meta(description="Commands that run.")]
    streams: Annotated[int, Meta(description="Event streams that are open.")]
    proxy_connections: int
    longest_stall: Annotated[float, Meta(description="Seconds by which the daemon was late, at most.")]
    idle: Annotated[float, Meta(description="Seconds since it was last used; 0 while anything runs.")]
    marks: Annotated[
        Literal["rlimit", "cgroup", "environment"], Meta(description="What the processes of a command are found by.")
    ]
    root: Annotated[str | None, Meta(description="The directory that file requests are confined to; null for none.")]
