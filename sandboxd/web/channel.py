"""
A client's HTTP connection: it parses requests one at a time, and writes their responses, with backpressure both ways.

What can be refused by a request's head alone (a bad token, a body that is too large) is refused as soon as that is
complete, and the rest is not waited for. A route that reads its body as it arrives is called then, too. The next
request is parsed when this one has been answered.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, cast
from typing import Protocol as Structural

from twisted.internet import tcp
from twisted.internet._producer_helpers import _PullToPush
from twisted.internet.interfaces import IAddress, IDelayedCall, IPushProducer, IReactorTime
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.reactor import liveness
from sandboxd.reactor.deadline import Deadline
from sandboxd.settings import Settings
from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyError, BodyStream
from sandboxd.web.chunked import ChunkedDecoder
from sandboxd.web.request import Refusal, Request
from sandboxd.web.request_head import END, Head, MalformedRequest, is_malformed, parse_head

#: Seconds that a refused client gets to read the answer while what it still sends is dropped. Closing at once
#: would make the kernel answer with a reset, which destroys the reply on its way.
LINGER = 5.0

#: Bytes that are given to the kernel at a time; Twisted's own limit would take several turns for a batch of events.
SEND_LIMIT = 1024 * 1024

#: Seconds in which a new connection has to send something.
FIRST_REQUEST = 60.0

#: Bytes behind a request that is being answered with which the client is not read from. Until then it is, for only
#: so is it noticed that it hangs up.
READ_AHEAD = 16 * 1024


class Server(Structural):
    """
    The interface that a connection needs of the server, :class:`sandboxd.web.site.Site`.

    :ivar settings: the limits of a request's size and time.
    :ivar reactor: for timeouts.
    """

    settings: Settings
    reactor: IReactorTime

    def connected(self, channel: Channel) -> None:
        """Register a new connection."""

    def lost(self, channel: Channel) -> None:
        """Forget a connection that is gone."""

    def admit(self, channel: Channel, request: Request) -> Refusal | None:
        """Return the refusal of a request, or None."""

    def process(self, request: Request) -> None:
        """Answer a request that has arrived, in its turn."""

    def ended(self, request: Request, code: int) -> None:
        """Count a request that was answered, or whose client is gone."""


@implementer(IPushProducer)
class Channel(Protocol):
    """
    A client's HTTP connection.

    :ivar refused: whether what still arrives is dropped.
    :ivar persistent: whether another request may follow the present one.
    """

    transport: tcp.Server

    def __init__(self, site: Server) -> None:
        self.site = site
        self.refused = False
        self.persistent = True
        self._buffer = b""  #: what has arrived and was not parsed
        self._head: Head | None = None  #: the one that was parsed last
        self._parsing = False
        self._request: Request | None = None
        self._begun = False  #: whether some of a request has arrived, but not all
        self._arriving = False  #: whether the present request's body is incomplete
        self._left = 0  #: bytes of it that are missing, if it is not chunked
        self._decoder: ChunkedDecoder | None = None
        self._receiver: Callable[[bytes], None] | None = None
        self._producer: Any = None
        self._pull: _PullToPush | None = None
        self._closing: Callable[[], None] | None = None  #: called before the socket is closed that was handed over
        self._blocked = False  #: whether the client has yet to take what was written
        self._held = False  #: whether the reader of the body has to catch up
        self._lent = False  #: whether that reads from the socket itself
        self._aborted = False
        self._reading = True
        self._deadline = Deadline(site.reactor, self._expired)
        self._lingering: IDelayedCall | None = None

    # The connection

    def connectionMade(self) -> None:
        """Register the connection, and wait for its first request."""
        self.site.connected(self)
        liveness.keep_alive(self.transport.getHandle())
        self.transport.SEND_LIMIT = SEND_LIMIT
        self.transport.registerProducer(self, True)
        self._deadline.set(FIRST_REQUEST)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Forget the connection, and cancel the request that is being answered."""
        self.site.lost(self)
        self._deadline.stop()
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        request, self._request = self._request, None
        if request is not None:
            request.connectionLost(reason)

    def loseConnection(self) -> None:
        """Close when all is written; after a refusal, only when the client has had time to read it."""
        self.take_back_socket()
        self.transport.unregisterProducer()
        if not self.refused:
            self.transport.loseConnection()
        elif self._lingering is None:
            self.transport.loseWriteConnection()
            self._lingering = self.site.reactor.callLater(LINGER, self.transport.abortConnection)

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self._request is not None

    @property
    def vanished(self) -> bool:
        """Whether the client's machine acknowledges nothing of what it was sent; one that only reads nothing does."""
        return liveness.has_vanished(self.transport.getHandle())

    def abort(self) -> None:
        """Close at once, so that the client cannot take a part of a response for the whole."""
        self._aborted = True
        self.take_back_socket()
        self.transport.abortConnection()

    def getPeer(self) -> IAddress:
        """Return the client's address."""
        return cast(IAddress, self.transport.getPeer())

    def getHost(self) -> IAddress:
        """Return the address that the client has connected to."""
        return cast(IAddress, self.transport.getHost())

    def isSecure(self) -> bool:
        """Return False: TLS ends in front of the daemon."""
        return False

    # Receiving

    def dataReceived(self, data: bytes) -> None:
        """Parse bytes of a request, or pass them on to the reader of an upgraded connection."""
        if self.refused:
            return
        if self._receiver is not None:
            self._receiver(data)
        elif self._arriving:
            self._body_received(data)
        else:
            self._buffer += data
            if self._request is None:
                self._parse()
            elif len(self._buffer) > READ_AHEAD:
                self._balance()

    def _parse(self) -> None:
        """Parse the requests whose heads have arrived; each waits until the one before it has been answered."""
        if self._parsing:
            return  # a request was answered at once: the loop below, which has begun it, goes on with the next
        self._parsing = True
        try:
            while self._buffer and self._request is None and not (self.refused or self._blocked):
                end = self._buffer.find(END)
                size = len(self._buffer) if end < 0 else end + len(END)
                if size > self.site.settings.max_header:
                    raise MalformedRequest
                if end < 0:
                    if is_malformed(self._buffer):
                        raise MalformedRequest
                    self._limit_arrival()
                    break
                data, self._buffer = self._buffer[:size], self._buffer[size:]
                if self._head is None or data != self._head.data:  # many clients repeat the one before
                    self._head = parse_head(data)
                self._begin(Request(self, self._head))
        except MalformedRequest:
            self._refuse_bytes(400, "the request is not valid HTTP/1.1, or its headers are too large")
        finally:
            self._parsing = False

    def _begin(self, request: Request) -> None:
        """Admit or refuse a request whose head has arrived, and start to read its body."""
        self._request = request
        head = request.head
        self.persistent = head.persistent
        refusal = self.site.admit(self, request)
        if refusal is not None and head.length != 0:
            self.refuse(request, refusal)
            return
        request.refusal = refusal
        if refusal is None:
            request.stream = self._stream(request)
        if head.length == 0:
            self._complete(request)
            return
        self._arriving = True
        self._left = head.length or 0
        if head.length is None:
            self._decoder = ChunkedDecoder(self._decoded, self.site.settings.max_header)
        if request.stream is not None and request.stream.patient:
            self._deadline.clear()
        else:
            self._limit_arrival()
        if request.stream is not None:
            if head.expects_continue:
                request.stream.begin = self._send_continue
            self.site.process(request)
        elif head.expects_continue:
            self._send_continue()
        if self._buffer and self._arriving and not self.refused:
            data, self._buffer = self._buffer, b""
            self._body_received(data)

    def _stream(self, request: Request) -> BodyStream | None:
        """Return the stream of a request's body if its route reads it as it arrives, else None."""
        if request.route is None or not (request.route.streams or request.route.forwards):
            return None
        stream = BodyStream(request.head.length, request.max_body, self.hold, patient=request.route.forwards)
        if request.head.length is not None:
            stream.source = self
        return stream

    def _body_received(self, data: bytes) -> None:
        request = self._request
        assert request is not None
        if self._decoder is not None:
            try:
                behind = self._decoder.feed(data)
            except MalformedRequest:
                self._refuse_body(request, 400, "the request body is not valid HTTP/1.1")
                return
        else:
            piece = data if len(data) <= self._left else data[: self._left]
            self._left -= len(piece)
            request.body_received(piece)
            behind = None if self._left else data[len(piece) :]
        if self.refused or not self._arriving:
            return
        if behind is not None:
            self._buffer = behind
            self._complete(request)
        elif request.stream is not None and not request.stream.patient:
            self._deadline.set(self.site.settings.request_timeout)

    def _decoded(self, piece: bytes) -> None:
        if self._request is not None and not self.refused:  # as it may be by the chunk before
            self._request.body_received(piece)

    def _complete(self, request: Request) -> None:
        """Have a request answered that has arrived completely, unless its route runs already."""
        called = self._arriving and request.stream is not None
        self._arriving = self._begun = False
        self._decoder = None
        self._deadline.clear()
        if request.stream is not None:
            request.stream.end()
        if not called:
            self.site.process(request)

    def _limit_arrival(self) -> None:
        if not self._begun:
            self._begun = True
            self._deadline.set(self.site.settings.request_timeout)

    def _expired(self) -> None:
        """Answer 408 or close, as the client was silent or slow for too long."""
        seconds = self.site.settings.request_timeout
        request = self._request
        if request is None and not self._buffer.strip(b"\r\n"):
            self.abort() if self._blocked else self.loseConnection()
        elif request is None:
            self._refuse_bytes(408, f"the request took more than {seconds} seconds to arrive")
        elif request.stream is None:
            self._refuse_body(request, 408, f"the request took more than {seconds} seconds to arrive")
        elif request.stream.held or self._lent:  # by us
            self._deadline.set(seconds)
        else:
            request.stream.fail(BodyError(408, f"no more of the request has arrived for {seconds} seconds"))

    # Refusing

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """Answer at once, drop the rest of the request, and close."""
        if not self.refused:
            self.cut_off()
            request.answer(refusal)

    def cut_off(self) -> None:
        """Drop the rest of a request that is about to be answered, and close after that."""
        self._deadline.clear()
        self.refused = True
        self.persistent = False
        self._arriving = self._begun = False
        self._buffer = b""
        self._balance()

    def _refuse_body(self, request: Request, status: int, error: str) -> None:
        if request.stream is None:
            self.refuse(request, Refusal(status, error))
        else:
            self.refused = True
            request.stream.fail(BodyError(status, error))

    def _refuse_bytes(self, status: int, error: str) -> None:
        """Answer bytes that are not a request, and close."""
        body = dumps({"error": error})
        self.cut_off()
        self.write(
            b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
            % (status, {400: b"Bad Request", 408: b"Request Timeout"}[status], len(body), body)
        )
        self.loseConnection()

    # What a request asks for

    def request_done(self) -> None:
        """Go on with the next request, or close, as the present one has been answered."""
        self._request = None
        self._held = False  # by a route that has not read all of its body
        if self.refused or not self.persistent:
            self._buffer = b""
            self.loseConnection()
            return
        self._deadline.set(self.site.settings.keep_alive)
        self._balance()
        if self._buffer:
            self._parse()

    def write(self, data: bytes) -> None:
        """
        Send bytes, at once if the kernel takes them.

        Twisted would ask epoll whether the socket is writable, and send in the next turn.
        """
        if self._aborted:
            return
        transport: Any = self.transport
        queued = transport.dataBuffer or transport._tempDataBuffer or len(data) > SEND_LIMIT
        if not queued and transport.connected and not transport.disconnecting:
            try:
                sent = transport.socket.send(data)
            except OSError:  # the kernel's buffer is full, or an error that the reactor meets again
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def drain(self) -> None:
        """Pause the producer until the kernel has all that was written, and takes more."""
        self.transport.producerPaused = True  # so the transport resumes it as soon as the socket can be written to
        self.pauseProducing()
        self.transport.startWriting()

    @property
    def unsent(self) -> bool:
        """Whether the kernel has yet to take bytes that were written."""
        transport: Any = self.transport
        return bool(transport.dataBuffer or transport._tempDataBuffer)

    def duplicate_socket(self) -> int | None:
        """
        Return a duplicate of the socket's descriptor, or None unless the kernel has all that was written.

        A thread can write there: the original may be closed meanwhile, and its number be another file's.
        """
        transport: Any = self.transport
        if self.unsent or self._aborted or transport.disconnecting or not transport.connected:
            return None
        try:
            return os.dup(transport.fileno())
        except OSError:  # no descriptor is left
            return None

    def hand_over_socket(self, closing: Callable[[], None]) -> socket.socket:
        """
        Return the socket, which is not read or written here until it is taken back. Nothing may be waiting to be sent.

        :param closing: called, once, if the connection is closed meanwhile; the socket must not be used any more then.
        """
        self.transport.unregisterProducer()
        self._closing = closing
        self._reading = False
        self.transport.stopReading()
        self.transport.stopWriting()
        return self.transport.getHandle()

    def take_back_socket(self) -> None:
        """Read and write the socket here again, if it was handed over."""
        closing, self._closing = self._closing, None
        if closing is not None:
            closing()
            self._balance()

    def _send_continue(self) -> None:
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def hold(self, held: bool) -> None:
        """Stop reading from the client, or go on, as the reader of the body demands."""
        self._held = held
        self._balance()

    def lend_socket(self) -> int | None:
        """
        Return a duplicate of the socket's descriptor, and read nothing until :meth:`return_socket`; None if that cannot
        be: the present request's body is not what comes next, or the connection ends.
        """
        transport: Any = self.transport
        if not self._arriving or self.refused or self._aborted or transport.disconnecting or not transport.connected:
            return None
        try:
            socket = os.dup(transport.fileno())
        except OSError:  # no descriptor is left
            return None
        self._lent = True
        self._balance()
        return socket

    def return_socket(self, count: int) -> None:
        """Read on: ``count`` bytes of the present request's body were read by another."""
        self._lent = False
        request = self._request
        if request is None or not self._arriving:
            return
        self._left -= count
        if self._left == 0:
            self._complete(request)
        elif count and request.stream is not None and not request.stream.patient:
            self._deadline.set(self.site.settings.request_timeout)
        self._balance()

    def upgrade(self, received: Callable[[bytes], None]) -> bytes:
        """
        Pass all further bytes of the client on, in place of parsing them.

        :param received: called with it instead.
        :return: what has arrived behind the request.
        """
        self._receiver = received
        self.persistent = False
        behind, self._buffer = self._buffer, b""
        self._balance()
        return behind

    def close_upgraded(self) -> None:
        """Close when all is written and the client has had time to read it; drop what it still sends."""
        self.cut_off()
        self.loseConnection()

    # Backpressure

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Register a request's producer, to be paused while the client has to catch up."""
        if not streaming:
            producer = self._pull = _PullToPush(producer, self)
        self._producer = producer
        if self._pull is not None:
            self._pull.startStreaming()

    def unregisterProducer(self) -> None:
        """Unregister the request's producer, as it writes no more."""
        pull, self._pull, self._producer = self._pull, None, None
        if pull is not None:
            pull.stopStreaming()

    def pauseProducing(self) -> None:
        """Pause the request's producer, as the client has to read first what was written."""
        self._blocked = True
        if self._producer is not None:
            self._producer.pauseProducing()
        self._balance()

    def resumeProducing(self) -> None:
        """Resume the request's producer, as the client has read what was written, and go on with the next request."""
        self._blocked = False
        if self._producer is not None:
            self._producer.resumeProducing()
        self._balance()
        self._parse()

    def stopProducing(self) -> None:
        """Stop the request's producer, as the connection is gone."""
        if self._producer is not None:
            self._producer.stopProducing()

    def _balance(self) -> None:
        """Start or stop reading from the client, by who has to catch up."""
        if self._closing is not None:
            return
        ahead = self._request is not None and len(self._buffer) > READ_AHEAD
        held = self._held or self._lent or ahead or (self._blocked and self._request is None)
        reading = self.refused or not held
        if reading != self._reading:
            self._reading = reading
            if reading:
                self.transport.resumeProducing()
            else:
                self.transport.pauseProducing()
