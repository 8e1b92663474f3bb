"""
The HTTP server under the routes: who is let in, and how much is read, before a request is handled.

Twisted calls a resource once the whole body has arrived. What can be refused by its headers alone (a bad token,
a body that is too large) is refused here as soon as they are complete, and the rest is not waited for. A route that
reads its body as it arrives is called then, too.
"""

from __future__ import annotations

import re
import resource
import socket
from collections import OrderedDict
from collections.abc import Callable
from time import perf_counter
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.internet.tcp import Connection, Server
from twisted.python.failure import Failure
from twisted.web import http, server
from twisted.web.http import HTTPChannel
from twisted.web.resource import IResource

from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.settings import Settings
from sandboxd.web.admission import Admission
from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyError, BodyStream
from sandboxd.web.request import Refusal, Request, printable
from sandboxd.web.request_stats import Answer, RequestStats

#: Seconds that a refused client gets to read the answer while what it still sends is dropped. Closing at once
#: would make the kernel answer with a reset, which destroys the reply on its way.
LINGER = 5.0

#: Seconds that clients get, when the daemon stops, to take what was already written to them.
LAST_WORDS = 2.0

#: Bytes that are given to the kernel at a time; Twisted's own limit would take several turns for a batch of events.
SEND_LIMIT = 1024 * 1024


#: Scheme and authority of an absolute URI, RFC 3986 section 3.
_ABSOLUTE_FORM = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)


def origin_form(uri: bytes) -> bytes:
    """Return a request's target without scheme and authority, which RFC 9112 section 3.2.2 has servers accept."""
    found = _ABSOLUTE_FORM.match(uri)
    if found is None:
        return uri
    rest = uri[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def keep_alive(transport: Connection) -> None:
    """Let the kernel find out within about two minutes that a silent peer is gone; it knows of local ones anyway."""
    sock = transport.getHandle()
    if sock.family == socket.AF_UNIX:
        return
    transport.setTcpKeepAlive(True)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Channel(HTTPChannel):
    """A client's connection."""

    site: Site
    transport: Server
    refused = False
    _lingering: IDelayedCall | None = None
    _arriving: IDelayedCall | None = None
    _stream: BodyStream | None = None
    _receiver: Callable[[bytes], None] | None = None

    def dataReceived(self, data: bytes) -> None:
        """Something has arrived: of a request, or of what follows one."""
        if self.refused:
            return
        if self._receiver is not None:
            self._receiver(data)
            return
        patient = self._stream is not None and self._stream.patient
        if self._arriving is None and not self._handlingRequest and not patient:
            self._arriving = self.callLater(self.site.settings.request_timeout, self._too_slow)
        super().dataReceived(data)

    def process(self, request: Request) -> None:
        """Answer a request that has arrived, in its turn."""
        self.site.process(request)

    def ended(self, request: Request, status: int) -> None:
        """Count a request that was answered, or whose client is gone."""
        self.site.ended(request, status)

    def progress(self) -> None:
        """Some more has arrived of a body that may take its time, as long as it comes."""
        if self._arriving is not None:
            self._arriving.reset(self.site.settings.request_timeout)

    def _too_slow(self) -> None:
        self._arriving = None
        if self._stream is not None:
            seconds = self.site.settings.request_timeout
            if self._stream.held:  # by us
                self._arriving = self.callLater(seconds, self._too_slow)
            else:
                self._stream.fail(BodyError(408, f"no more of the request has arrived for {seconds} seconds"))
            return
        body = dumps({"error": f"the request took more than {self.site.settings.request_timeout} seconds to arrive"})
        self._answer_and_close(b"408 Request Timeout", body)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def allHeadersReceived(self) -> None:
        """Decide by the headers whether to go on."""
        request: Request = self.requests[-1]
        self._path = origin_form(self._path)
        request.begin(self._command, self._path)
        refusal = self.site.admit(request, self.length)
        if refusal is None:
            if request.route is not None and request.route.forwards:
                self._arrived()
                self._stream_body(request, BodyStream(self.length, None, self.hold, patient=True))
            elif request.route is not None and request.route.streams:
                self._stream_body(request, BodyStream(self.length, request.max_body, self.hold))
            else:
                super().allHeadersReceived()
        elif self.length == 0:
            request.refusal = refusal
            super().allHeadersReceived()
        else:
            self.refuse(request, refusal)

    def _stream_body(self, request: Request, stream: BodyStream) -> None:
        """Call the route, which reads the body as it arrives."""
        self._stream = request.stream = stream
        super().allHeadersReceived()
        if self.length != 0:
            self.setTimeout(None)  # ours is in place of Twisted's
            request.requestReceived(self._command, self._path, self._version)

    def hold(self, held: bool) -> None:
        """Let the client wait until the reader of what it sends has caught up."""
        if held:
            self.transport.pauseProducing()
        elif self._receiver is not None or not self._waitingForTransport:
            self.transport.resumeProducing()

    def resumeProducing(self) -> None:
        """The client has taken what was written."""
        super().resumeProducing()
        if self._stream is not None and self._stream.held:
            self.transport.pauseProducing()

    def _send100Continue(self) -> None:
        """Ask for the body; if the route reads it by itself, then when it wants it, for it may refuse it unread."""
        if self._stream is None:
            super()._send100Continue()
        else:
            self._stream.begin = super()._send100Continue

    def cut_off(self, request: Request) -> None:
        """Take no notice of the rest of a request, which is about to be answered, and close when it is."""
        self._arrived()
        self.refused = True
        self.persistent = False
        self.setTimeout(None)
        self._stream = None
        self.transport.resumeProducing()
        request.setHeader(b"Connection", b"close")

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """Answer now, take no notice of the rest of the request, and close."""
        if self.refused:
            return
        self.cut_off(request)
        request.method, request.uri, request.clientproto = self._command, self._path, self._version
        request.path = request.uri.partition(b"?")[0]
        request.answer(refusal)

    def lineReceived(self, line: bytes) -> None:
        """A line of a request's head has arrived."""
        if not self.refused:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        """One is too long."""
        self._respondToBadRequestAndDisconnect()

    def rawDataReceived(self, data: bytes) -> None:
        """Some of a body, or of the next request, has arrived."""
        if self._receiver is not None:
            self.dataReceived(data)
        elif not self.refused:
            super().rawDataReceived(data)

    def allContentReceived(self) -> None:
        """The body is complete."""
        self._arrived()
        stream, self._stream = self._stream, None
        if self.refused:
            return
        self.setTimeout(self.site.settings.keep_alive)  # for Twisted to save, and to restore after the response
        if stream is not None:
            stream.end()
        super().allContentReceived()

    def flush(self) -> None:
        """Give the kernel what was written now; the reactor would do so in its next turn."""
        if self.transport.connected and not self.transport.disconnecting:
            self.transport.doWrite()  # of an error it takes no notice: the reactor meets it again

    def upgrade(self, received: Callable[[bytes], None]) -> bytes:
        """
        Parse nothing more of what the client sends.

        :param received: called with it instead.
        :return: what has arrived behind the request.
        """
        self._receiver = received
        self.persistent = False
        behind, self._dataBuffer = b"".join(self._dataBuffer), []
        self.transport.resumeProducing()
        return behind

    def close_upgraded(self) -> None:
        """Close when all is written and the client has had the time to read it; drop what it still sends."""
        self.refused = True
        self.transport.resumeProducing()
        self.loseConnection()

    def abort(self) -> None:
        """Close at once, so that the client cannot take what it got for all there is."""
        self.transport.abortConnection()

    def loseConnection(self) -> None:
        """Close when all is written; after a refusal, also when the client has had the time to read it."""
        if not self.refused:
            super().loseConnection()
        elif self._lingering is None:
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()
            self._lingering = self.callLater(LINGER, self.transport.abortConnection)

    def connectionMade(self) -> None:
        """A client has connected."""
        self.site.connected(self)
        self.MAX_LENGTH = self.totalHeadersSize = self.site.settings.max_header
        keep_alive(self.transport)
        self.transport.SEND_LIMIT = SEND_LIMIT
        super().connectionMade()

    def timeoutConnection(self) -> None:
        """Close a connection on which no request has come for too long; Twisted's own would log each."""
        self.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The connection is gone."""
        self.site.lost(self)
        self._arrived()
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        super().connectionLost(reason)

    def _respondToBadRequestAndDisconnect(self) -> None:
        body = dumps({"error": "the request is not valid HTTP/1.1, or its headers are too large"})
        self._answer_and_close(b"400 Bad Request", body)

    def _answer_and_close(self, status: bytes, body: bytes) -> None:
        """Answer what has not become a request."""
        if self._stream is not None:
            self._stream.fail(BodyError(400, "the request body is not valid HTTP/1.1"))
            return
        self._arrived()
        self.transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (status, len(body), body)
        )
        self.refused = True
        self.loseConnection()


class Site(server.Site):
    """
    The HTTP server.

    :param resource: the routes.
    :param admission: decides which requests go on to the routes.
    :param turns: shares out the time of the reactor.
    :param settings: how much of a request is taken, and how slowly it may come.
    :param log_access: logs a request, given a format and its fields; None for nothing.
    :ivar tally: counts requests.
    """

    protocol = cast(Any, Channel)
    noisy = False

    def __init__(
        self,
        resource: IResource,
        admission: Admission,
        settings: Settings,
        turns: TurnBudget,
        reactor: IReactorTime,
        log_access: Callable[..., None] | None = None,
    ) -> None:
        super().__init__(resource, requestFactory=Request, reactor=reactor, parsePOSTFormSubmission=False)
        self.displayTracebacks = False
        self._admission = admission
        self.settings = settings
        self._turns = turns
        self.tally = RequestStats(reactor)
        self._log_access = log_access
        self.channels: set[Channel] = set()
        self._anonymous: OrderedDict[Channel, None] = OrderedDict()
        self._all_lost: Deferred[None] | None = None

    async def close_all(self) -> None:
        """Close every connection once what was written to it is sent, or after :data:`LAST_WORDS` seconds."""
        for channel in list(self.channels):
            channel.loseConnection()
        if not self.channels:
            return
        self._all_lost = Deferred()
        timeout = self.reactor.callLater(LAST_WORDS, self._abort_all)
        await self._all_lost
        if timeout.active():
            timeout.cancel()

    def connected(self, channel: Channel) -> None:
        """
        Keep a new connection.

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

    def _abort_all(self) -> None:
        for channel in list(self.channels):
            channel.transport.abortConnection()

    def process(self, request: Request) -> None:
        """Answer a request that has arrived: in its turn, but at once if its route is open, as health has to be."""
        if request.claim is not None:
            Deferred.fromCoroutine(self._claim(request, request.claim))
        elif request.route is not None and request.route.open:
            request.call_route()
        else:
            self._turns.take(request.call_route)

    async def _claim(self, request: Request, authorization: bytes) -> None:
        request.refusal = request.refusal or await self._admission.claim(authorization)
        self._turns.take(request.call_route)

    def admit(self, request: Request, length: int | None) -> Refusal | None:
        """
        Return why a request is refused, or None.

        :param length: bytes of its body; None if that is chunked.
        """
        refusal = self._admission.check(request, length)
        channel = cast(Channel, request.channel)
        if request.authenticated:
            self._anonymous.pop(channel, None)
        elif channel in self._anonymous:
            self._anonymous.move_to_end(channel)
        if request.active:
            self.tally.open += 1
        return refusal

    def log(self, request: http.Request) -> None:
        """A request was answered."""
        assert isinstance(request, Request)
        self.ended(request, request.code)

    def ended(self, request: Request, code: int) -> None:
        """
        A request is over: count it, and log it if that is wished; never its query, headers or body.

        :param code: its status, or :data:`~sandboxd.web.request_stats.HUNG_UP`.
        """
        route = request.template or ""
        method = request.method.decode("ascii", "replace") if route else ""
        self.tally.answered(Answer(method, route, code), request.latency, request.sentLength)
        if request.active:
            self.tally.closed()
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
