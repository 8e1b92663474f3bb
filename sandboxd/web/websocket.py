"""
The server's end of WebSockets (RFC 6455), on the connections of the HTTP requests that ask for them.

The protocol itself is that of the ``websockets`` library, without I/O of its own and without compression. Here are its
opening on a request, and backpressure both ways: a client that sends more than its route reads is not read from, and
a route that sends more than its client reads has to wait.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, DeferredList, TimeoutError
from twisted.internet.interfaces import IPushProducer, IReactorTime
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import Logger
from zope.interface import implementer

from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.auth import BEARER_PROTOCOL
from sandboxd.web.request import Request

if TYPE_CHECKING:  # imported when the first WebSocket is opened
    from websockets.http11 import Response
    from websockets.server import ServerProtocol
    from websockets.typing import Subprotocol

#: Bytes of the longest message that is accepted; a longer one closes the WebSocket with code 1009.
MAX_MESSAGE = 1024 * 1024

#: Bytes of received messages that may wait for the route, and of pongs that may wait for a client that does not read;
#: with more, the client is not read from.
HIGH_WATER = 256 * 1024

#: Seconds in which a WebSocket may end by itself when the daemon stops, before it is closed with code 1001.
END_TIMEOUT = 1.0

#: Seconds that a client has to answer a closing handshake, having read all that was sent before; also those that a
#: route has to deliver what was received before it.
CLOSE_TIMEOUT = 30.0

NORMAL = 1000
GOING_AWAY = 1001
POLICY_VIOLATION = 1008

#: Headers of a response that a 101 does not have.
_NOT_OF_AN_UPGRADE = (b"content-type", b"content-length", b"server", b"date", b"connection", b"upgrade")


class HandshakeError(Exception):
    """
    A request cannot become a WebSocket.

    :ivar status: what to answer.
    """

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


class WebSocketClosed(Exception):
    """Nothing can be sent: the closing handshake has begun."""


@implementer(IPushProducer)
class WebSocket:
    """
    An open WebSocket. The route that opened it awaits :meth:`receive` and :meth:`send`, and :meth:`close` at the end.

    A disconnect cancels the route's Deferred, and so what the route awaits.

    :ivar subprotocol: the one that was agreed upon, or None.
    :ivar paused: whether the client has yet to take what was sent.
    :ivar finishes: whether its route ends by itself when the daemon stops.
    """

    finishes = False

    def __init__(
        self, request: Request, protocol: ServerProtocol, clock: IReactorTime, head: bytes, subprotocol: str | None
    ) -> None:
        self._protocol = protocol
        self._clock = clock
        self.subprotocol = subprotocol
        self._pieces: list[bytes] = []
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._pongs = 0  #: bytes that were sent in answer to what was received, since the client no longer reads
        self._held = False
        self._ended = False
        self._lost = False
        self._closing: OneShot[None] = OneShot()
        self._reader: Deferred[None] | None = None
        self._writer: Deferred[None] | None = None
        self.paused = False
        self._request = request
        request.notifyFinish().addBoth(self._disconnected)
        behind = request.switch_protocols(head, self._data_received)
        request.registerProducer(self, True)
        if behind:
            self._data_received(behind)

    async def receive(self) -> bytes | None:
        """Return the next message, text as UTF-8; None once either side has closed."""
        while not self._messages:
            if self._ended:
                return None
            self._reader = Deferred()
            await self._reader
        message = self._messages.popleft()
        self._size -= len(message)
        self._balance()
        return message

    async def send(self, data: bytes | str) -> None:
        """
        Send a message, binary for bytes, once the client has taken what was sent before.

        :raise WebSocketClosed: if the WebSocket is no longer open.
        """
        await self.when_ready()
        if self._ended:
            raise WebSocketClosed
        if isinstance(data, str):
            self._protocol.send_text(data.encode("utf-8"))
        else:
            self._protocol.send_binary(data)
        self._flush()

    async def when_ready(self) -> None:
        """Wait until the client has taken what was sent, or nothing more can be sent."""
        while self.paused and not self._ended:
            self._writer = Deferred()
            await self._writer

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """
        Close in order: send a Close frame and wait for the client's, at most :data:`CLOSE_TIMEOUT` seconds.

        :param reason: up to 123 bytes of UTF-8.
        """
        await self.when_ready()
        self.begin_close(code, reason)
        if self._lost or self._protocol.close_rcvd is not None or self._protocol.eof_sent:
            return
        reader: Deferred[None] = Deferred()
        self._reader = reader
        timeout = self._clock.callLater(CLOSE_TIMEOUT, reader.cancel)
        try:
            await reader
        except CancelledError:
            if self._lost or timeout.active():
                raise
        finally:
            if timeout.active():
                timeout.cancel()

    def when_closing(self) -> Deferred[None]:
        """Return a Deferred that fires when nothing more can be sent."""
        return self._closing.when_fired()

    async def when_overdue(self) -> None:
        """Wait until the closing handshake began :data:`CLOSE_TIMEOUT` seconds ago."""
        await self.when_closing()
        await deferLater(self._clock, CLOSE_TIMEOUT)

    def begin_close(self, code: int, reason: str = "") -> None:
        """Send a Close frame if none was sent; :meth:`receive` returns None from now on."""
        if not self._ended:
            self._protocol.send_close(code, reason)
            self._end()
            self._flush()

    def ping(self) -> None:
        """Send a ping, unless the client has yet to take what was sent."""
        if not (self.paused or self._ended):
            self._protocol.send_ping(b"")
            self._flush()

    def pauseProducing(self) -> None:
        """Make the writer wait, as the client reads more slowly than it writes."""
        self.paused = True

    def resumeProducing(self) -> None:
        """Let the writer go on, as the client has caught up."""
        self.paused = False
        self._pongs = 0
        self._balance()
        self._wake_writer()

    def stopProducing(self) -> None:
        """Do nothing: the client is gone, and the cancellation of the route follows."""

    def _data_received(self, data: bytes) -> None:
        from websockets.frames import Frame

        if self._lost:
            return
        self._protocol.receive_data(data)
        for frame in self._protocol.events_received():
            self._frame_received(cast(Frame, frame))
        sent = self._flush()
        if self.paused:
            self._pongs += sent
            self._balance()
        if self._protocol.close_rcvd is not None or self._protocol.eof_sent:
            self._end()
            self._wake_reader()

    def _frame_received(self, frame: Any) -> None:
        from websockets.frames import DATA_OPCODES

        if frame.opcode not in DATA_OPCODES or self._ended:
            return
        self._pieces.append(bytes(frame.data))
        self._size += len(frame.data)
        if frame.fin:
            message = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            self._messages.append(message)
            self._wake_reader()
        self._balance()

    def _balance(self) -> None:
        """
        Stop reading from the client while too much waits for the route, unless the rest of a message is awaited, or for
        the client, which a client that sends pings without reading the pongs could make grow without bound.
        """
        held = self._size > HIGH_WATER and bool(self._messages) and not self._ended
        held = held or self._pongs > HIGH_WATER
        if held != self._held and not self._lost:
            self._held = held
            self._request.connection.hold(held)

    def _flush(self) -> int:
        """Send what the protocol has to send; return its number of bytes."""
        data = b"".join(self._protocol.data_to_send())
        if data and not self._lost:
            self._request.send_raw(data)
        return len(data)

    def _end(self) -> None:
        """Start no new message in either direction; what was received can still be read."""
        self._ended = True
        self._closing.fire(None)
        self._balance()
        self._wake_writer()
        if not self._messages:
            self._wake_reader()

    def _disconnected(self, _: object) -> None:
        self._lost = self._ended = True
        self._closing.fire(None)

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.called:
            writer.callback(None)


class WebSockets(Service):
    """
    The open WebSockets. Each gets a ping every ``heartbeat`` seconds, and a Close frame when this stops.

    :ivar opened: how many there have been, by kind.
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, heartbeat: float) -> None:
        self._clock = clock
        self._interval = heartbeat
        self._open: dict[WebSocket, str] = {}
        self.opened: Counter[str] = Counter()
        self._pings = LoopingCall(self._ping_all)
        self._pings.clock = clock

    def count(self, kind: str) -> int:
        """Return how many of a kind are open."""
        return sum(each == kind for each in self._open.values())

    def accept(self, request: Request, kind: str, subprotocols: Sequence[str], default: str | None = None) -> WebSocket:
        """
        Answer 101 and open a WebSocket.

        :param kind: the kind to count it as, for the metrics.
        :param subprotocols: the supported ones, best first.
        :param default: the one that is spoken, without being named, if the client asks for none; None for no name.
        :raise HandshakeError: if the request does not ask for a WebSocket, or for none of the subprotocols.
        """
        socket = _accept(request, self._clock, subprotocols)
        if socket.subprotocol is None:
            socket.subprotocol = default
        self._open[socket] = kind
        self.opened[kind] += 1
        request.notifyFinish().addBoth(lambda _: self._open.pop(socket, None))
        return socket

    def startService(self) -> None:
        """Start to send pings."""
        super().startService()
        self._pings.start(self._interval, now=False).addErrback(
            lambda failure: self._log.failure("pings have stopped", failure)
        )

    def stopService(self) -> Deferred[None]:
        """Close all WebSockets with code 1001; those that end by themselves get :data:`END_TIMEOUT` seconds for it."""
        super().stopService()
        if self._pings.running:
            self._pings.stop()
        return Deferred.fromCoroutine(self._close_all())

    async def _close_all(self) -> None:
        finishing = [socket.when_closing() for socket in self._open if socket.finishes]
        for socket in list(self._open):
            if not socket.finishes:
                socket.begin_close(GOING_AWAY, "the daemon is stopping")
        with suppress(TimeoutError):
            await DeferredList(finishing, consumeErrors=True).addTimeout(END_TIMEOUT, self._clock)
        for socket in list(self._open):
            socket.begin_close(GOING_AWAY, "the daemon is stopping")

    def _ping_all(self) -> None:
        for socket in list(self._open):
            socket.ping()


def offered_subprotocols(request: Request) -> list[str]:
    """Return the subprotocols that a request offers, in its order, without one that carries a bearer token."""
    values = (request.joined_header("Sec-WebSocket-Protocol") or "").split(",")
    return [name for value in values if (name := value.strip()) and not name.startswith(BEARER_PROTOCOL)]


def check_handshake(request: Request, subprotocols: Sequence[str]) -> Response:
    """
    Check that a request asks for a WebSocket that can be opened.

    :param subprotocols: the supported ones, best first.
    :return: the response that opens it.
    :raise HandshakeError: if it does not.
    """
    from websockets.datastructures import Headers
    from websockets.http11 import Request as Handshake
    from websockets.server import ServerProtocol

    offered = offered_subprotocols(request)
    if not offered and request.joined_header("Sec-WebSocket-Protocol"):
        raise HandshakeError(400, f"Sec-WebSocket-Protocol: ask for {subprotocols[0]} beside the bearer token")
    chosen = next((name for name in subprotocols if name in offered), None)
    if offered and chosen is None:
        raise HandshakeError(400, f"Sec-WebSocket-Protocol: only {', '.join(subprotocols)} can be spoken")
    headers = Headers(
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, values in request.requestHeaders.getAllRawHeaders()
        for value in values
    )
    protocol = ServerProtocol(select_subprotocol=lambda *_: cast("Subprotocol | None", chosen))
    if (request.method, request.clientproto) != (b"GET", b"HTTP/1.1"):  # not every release of websockets looks
        raise HandshakeError(426, "a WebSocket is opened by GET in HTTP/1.1")
    response = protocol.accept(Handshake(request.uri.decode("latin-1"), headers))
    if response.status_code != 101:
        for name in ("Upgrade", "Allow"):
            if name in response.headers:
                request.setHeader(name.encode("ascii"), response.headers[name].encode("ascii"))
        if response.status_code == 426:
            raise HandshakeError(426, "this route is a WebSocket; connect to it with a WebSocket client")
        raise HandshakeError(response.status_code, str(protocol.handshake_exc))
    return response


def _accept(request: Request, clock: IReactorTime, subprotocols: Sequence[str]) -> WebSocket:
    from websockets.protocol import OPEN
    from websockets.server import ServerProtocol

    response = check_handshake(request, subprotocols)
    headers = [f"{name}: {value}".encode("latin-1") for name, value in response.headers.raw_items()]
    headers += [
        b"%s: %s" % (name, value)
        for name, values in request.responseHeaders.getAllRawHeaders()
        if name.lower() not in _NOT_OF_AN_UPGRADE
        for value in values
    ]
    head = b"HTTP/1.1 101 Switching Protocols\r\n%s\r\n\r\n" % b"\r\n".join(headers)
    protocol = ServerProtocol(state=OPEN, max_size=MAX_MESSAGE)
    return WebSocket(request, protocol, clock, head, response.headers.get("Sec-WebSocket-Protocol"))
