"""``/status``: how the daemon is doing, for whoever has the token. Not in the Go server."""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from sandboxd import __version__
from sandboxd.api.routing import Reply, Routes
from sandboxd.execution.table import ProcessTable
from sandboxd.metrics import Metrics
from sandboxd.proxy.portforward import PortForward
from sandboxd.replies import DaemonStatus
from sandboxd.web.request import Request
from sandboxd.web.sse import Streams
from sandboxd.reactor.lag import StallMeter


def add_status_route(
    routes: Routes,
    clock: IReactorTime,
    table: ProcessTable,
    streams: Streams,
    forward: PortForward,
    stalls: StallMeter,
    metrics: Metrics,
) -> None:
    """Add it to the API."""
    started = clock.seconds()

    @routes.get("/status", reply=DaemonStatus)
    async def status(request: Request) -> Reply:
        """How the daemon is doing."""
        return Reply(
            {
                "version": __version__,
                "uptime": round(clock.seconds() - started, 3),
                "executions": len(table.live),
                "streams": len(streams),
                "proxy_connections": len(forward.connections),
                "longest_stall": round(stalls.longest, 4),
                "idle": round(metrics.idle, 3),
            }
        )
