"""Is it up?"""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from sandboxd import __version__
from sandboxd.api.routing import Reply, Routes
from sandboxd.messages.daemon import Health
from sandboxd.web.request import Request


def add_health_route(routes: Routes, clock: IReactorTime, proxy_port: int) -> None:
    """
    Add it to the API.

    :param proxy_port: where the proxy listens.
    """
    started = clock.seconds()

    @routes.get("/health", reply=Health)
    async def health(request: Request) -> Reply:
        """Whether the daemon answers. Needs no token."""
        uptime = int(clock.seconds() - started)
        return Reply({"status": "ok", "version": __version__, "uptime": uptime, "proxy_port": str(proxy_port)})
