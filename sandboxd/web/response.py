"""A long response, written at the pace at which its client reads."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from sandboxd.web.request import Request


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

    async def when_drained(self) -> None:
        """Wait until the kernel has all that was written, and takes more."""
        if not self._stopped:
            self._request.drain()
        await self.when_ready()

    def socket(self, framed: bool = False) -> int | None:
        """
        Return a duplicate of the client's socket, to which the caller writes the next bytes of the body, and which it
        closes; None if something else has to be written first, or the body is sent in chunks.

        What is written there is reported to :meth:`sent`; nothing else may be written meanwhile.

        :param framed: whether who writes there makes chunks, if the body is sent in chunks.
        """
        return None if self._stopped else self._request.duplicate_socket(framed)

    def sent(self, count: int) -> None:
        """Count bytes that the caller has written to :meth:`socket`."""
        self._request.sentLength += count

    def finish(self) -> None:
        """Stop producing. The caller finishes the request itself."""
        if not self._stopped:
            self._stopped = True
            self._request.unregisterProducer()

    def pauseProducing(self) -> None:
        """Make the writer wait, as the client reads more slowly than it writes."""
        self.paused = True

    def resumeProducing(self) -> None:
        """Let the writer go on, as the client has caught up."""
        self.paused = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.called:
            waiting.callback(None)

    def stopProducing(self) -> None:
        """Drop what is still written, as the client is gone; the route's cancellation follows."""
        self._stopped = True
