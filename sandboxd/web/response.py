"""Writes a long response at the pace at which its client reads."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.web.server import Request
from zope.interface import implementer


@implementer(IPushProducer)
class ResponseStream:
    """
    The body of a response, as a push producer: await :meth:`when_ready` before each :meth:`write`.

    :ivar paused: whether the client has yet to take what was written.

    Being cancelled is how it ends early: a disconnect cancels the route's Deferred, and so what the route awaits.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self.paused = False
        self._stopped = False
        self._waiting: Deferred[None] | None = None
        request.registerProducer(self, True)

    async def when_ready(self) -> None:
        """Wait until the client has taken what was written."""
        if self.paused:
            self._waiting = Deferred()
            await self._waiting

    def write(self, data: bytes) -> None:
        """Send some of the body."""
        if not self._stopped:
            self._request.write(data)

    def finish(self) -> None:
        """No more will be written; the request itself is finished by whoever renders it."""
        if not self._stopped:
            self._stopped = True
            self._request.unregisterProducer()

    def pauseProducing(self) -> None:
        """The client reads more slowly than we write."""
        self.paused = True

    def resumeProducing(self) -> None:
        """The client has caught up."""
        self.paused = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.called:
            waiting.callback(None)

    def stopProducing(self) -> None:
        """The client is gone; the cancellation follows."""
        self._stopped = True
