"""Is it up?"""

from __future__ import annotations

from twisted.internet.interfaces import IReactorTime

from sandboxd import __version__
from sandboxd.api.routing import Routes
from sandboxd.messages.daemon import Health
from sandboxd.web.request import Request


def add_health_route(routes: Routes, clock: IReactorTime, proxy_port: int) -> None:
    """
    Add it to the API.

    :param proxy_port: where the proxy listens.
    """
    started = clock.seconds()

    @routes.get("/health", reply=Health, open=True, observes=True)
    async def health(request: Request) -> Health:
        """Whether the daemon answers. Needs no token."""
        return Health("ok", __version__, int(clock.seconds() - started), str(proxy_port))
