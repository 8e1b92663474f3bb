"""Ask a server of the sandbox over HTTP whether it is ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.processes.listeners import INTERVAL
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool

if TYPE_CHECKING:  # imported with the first probe: it costs as much as a third of a start
    from treq.client import HTTPClient

#: Seconds that one answer may take.
PATIENCE = 5


class HttpProbe:
    """
    Sends requests to ports of the loopback interface. Redirects are answers, and not followed.

    :param blocking: runs a blocking function off the reactor's thread.
    """

    _log = Logger()

    def __init__(self, reactor: Reactor, blocking: ThreadPool) -> None:
        self._reactor = reactor
        self._blocking = blocking
        self._client: HTTPClient | None = None

    async def when_answered(self, port: int, path: str) -> None:
        """Ask every :data:`~sandboxd.processes.listeners.INTERVAL` seconds until the answer is 2xx or 3xx."""
        while True:
            asked = self._reactor.seconds()
            if await self.answers(port, path):
                return
            await deferLater(self._reactor, max(0.0, asked + INTERVAL - self._reactor.seconds()))

    async def answers(self, port: int, path: str) -> bool:
        """
        Return whether ``GET http://127.0.0.1:<port><path>`` is answered with 2xx or 3xx.

        :param path: with its query, as it stands in a request's first line.
        """
        asking = Deferred.fromCoroutine(self._get(f"http://127.0.0.1:{port}{path}")).addTimeout(PATIENCE, self._reactor)

        def cancelled(answer: Deferred[bool]) -> None:
            answer.errback(CancelledError())  # or what Agent makes of the cancellation would pass for an answer
            asking.cancel()

        answer: Deferred[bool] = Deferred(cancelled)
        asking.addErrback(self._not_ready, port).addCallback(
            lambda code: None if answer.called else answer.callback(200 <= code < 400)
        )
        return await answer

    def _not_ready(self, failure: Failure, port: int) -> int:
        self._log.debug("port {port} does not answer: {error}", port=port, error=failure.value)
        return 0

    async def _get(self, url: str) -> int:
        if self._client is None:
            self._client = (await self._blocking(_client))(self._reactor)
        response = await self._client.get(url, allow_redirects=False, unbuffered=True)
        response.deliverBody(_HangUp())
        return int(response.code)


class _HangUp(Protocol):
    """Reads no body."""

    def connectionMade(self) -> None:
        """The body begins."""
        assert self.transport is not None
        self.transport.loseConnection()


def _client() -> Callable[[Reactor], HTTPClient]:
    """Import what makes an HTTP client. Blocks: that takes a fifth of a second."""
    from treq.client import HTTPClient
    from twisted.web.client import Agent, HTTPConnectionPool

    def client(reactor: Reactor) -> HTTPClient:
        pool = HTTPConnectionPool(reactor, persistent=False)
        pool._factory.noisy = False  # or each probe would be logged twice
        return HTTPClient(Agent(reactor, connectTimeout=PATIENCE, pool=pool))

    return client
