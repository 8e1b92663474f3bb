"""The HTTP server under the routes: its connections, the admission, statistics and log of requests."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable
from time import perf_counter

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import server
from twisted.web.resource import IResource

from sandboxd.reactor import liveness
from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.settings import Settings
from sandboxd.web.admission import Admission
from sandboxd.web.channel import Channel
from sandboxd.web.request import Refusal, Request, printable
from sandboxd.web.request_stats import AnswerKind, RequestStats

#: Seconds that clients get, when the daemon stops, to take what was already written to them.
CLOSE_TIMEOUT = 2.0

#: The methods that are counted by their names (RFC 9110, RFC 5789).
_METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS")


class Site(server.Site):
    """
    The HTTP server.

    :param resource: the routes.
    :param admission: decides which requests go on to the routes.
    :param turns: shares out the time of the reactor.
    :param settings: how much of a request is taken, and how slowly it may come.
    :param log_access: logs a request, given a format and its fields; None for nothing.
    :ivar stats: counts requests.
    """

    noisy = False
    _log = Logger()

    def __init__(
        self,
        resource: IResource,
        admission: Admission,
        settings: Settings,
        turns: TurnBudget,
        reactor: IReactorTime,
        log_access: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(resource, reactor=reactor)
        self.displayTracebacks = False
        self._admission = admission
        self.settings = settings
        self._turns = turns
        self.stats = RequestStats(reactor)
        self._log_access = log_access
        self.channels: set[Channel] = set()
        self._anonymous: OrderedDict[Channel, None] = OrderedDict()
        self._all_lost: Deferred[None] | None = None
        self._looks = LoopingCall(self._abort_vanished)
        self._looks.clock = reactor

    def startFactory(self) -> None:
        """Start to look for clients that have vanished."""
        super().startFactory()
        self._looks.start(liveness.INTERVAL, now=False).addErrback(
            lambda failure: self._log.failure("vanished clients are no longer noticed", failure)
        )

    def stopFactory(self) -> None:
        """Look no more."""
        if self._looks.running:
            self._looks.stop()
        super().stopFactory()

    def buildProtocol(self, addr: IAddress | None) -> Channel:  # type: ignore[override]
        """Return the protocol of a new connection."""
        return Channel(self)

    async def close_all(self) -> None:
        """Close every connection once what was written to it is sent, or after :data:`CLOSE_TIMEOUT` seconds."""
        for channel in list(self.channels):
            channel.loseConnection()
        if not self.channels:
            return
        self._all_lost = Deferred()
        timeout = self.reactor.callLater(CLOSE_TIMEOUT, self._abort_all)
        await self._all_lost
        if timeout.active():
            timeout.cancel()

    def connected(self, channel: Channel) -> None:
        """
        Register a new connection.

        Those that have sent no valid token yet get at most half of the descriptors that this process may have; of more,
        the one that has been idle for the longest time is closed.
        """
        self.channels.add(channel)
        self._anonymous[channel] = None
        if len(self._anonymous) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            oldest, _ = self._anonymous.popitem(last=False)
            # At once: abortConnection would close it in the next turn, and more may be accepted in this one.
            oldest.transport.connectionLost(Failure(ConnectionAborted()))

    def lost(self, channel: Channel) -> None:
        """Forget a connection that is gone."""
        self.channels.discard(channel)
        self._anonymous.pop(channel, None)
        if not self.channels and self._all_lost is not None:
            waiting, self._all_lost = self._all_lost, None
            waiting.callback(None)

    def _abort_vanished(self) -> None:
        for channel in [each for each in self.channels if each.busy and each.vanished]:
            self._log.debug("the client at {peer} has vanished", peer=channel.getPeer())
            channel.abort()

    def _abort_all(self) -> None:
        for channel in list(self.channels):
            channel.abort()

    def process(self, request: Request) -> None:
        """Answer a request that has arrived: in its turn, or at once if its route is open, as health has to be."""
        if request.claim is not None:
            Deferred.fromCoroutine(self._claim(request, request.claim))
        elif request.route is not None and request.route.open:
            request.call_route()
        else:
            self._turns.take(request.call_route)

    async def _claim(self, request: Request, authorization: bytes) -> None:
        request.refusal = request.refusal or await self._admission.claim(authorization)
        self._turns.take(request.call_route)

    def admit(self, channel: Channel, request: Request) -> Refusal | None:
        """Return the refusal of a request, or None."""
        refusal = self._admission.check(request, request.head.length)
        if request.authenticated:
            self._anonymous.pop(channel, None)
        elif channel in self._anonymous:
            self._anonymous.move_to_end(channel)
        if request.active:
            self.stats.open += 1
        return refusal

    def ended(self, request: Request, code: int) -> None:
        """
        Count a request that is over, and log it if the access log is on; never its query, headers or body.

        :param code: its status, or :data:`~sandboxd.web.request_stats.HUNG_UP`.
        """
        route = request.template or ""
        method = request.method.decode("ascii") if route and request.method in _METHODS else ""
        self.stats.answered(AnswerKind(method, route, code), request.latency, request.sentLength)
        if request.active:
            self.stats.closed()
        if self._log_access is None:
            return
        self._log_access(
            "{method} {path} {status} {duration:.6f} s {sent} B to {peer} [{request_id}]",
            method=printable(request.method),
            path=printable(request.path),
            route=request.template,
            status=code,
            latency=round(request.latency, 6),
            duration=round(perf_counter() - request.began, 6),
            sent=request.sentLength,
            peer=getattr(request.getClientAddress(), "host", "a local socket"),
            request_id=request.id.decode("ascii"),
        )
