"""Outgoing TCP connections to ports of this machine, read and written by coroutines."""

from __future__ import annotations

from typing import cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.tcp import Connection
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.reactor.interfaces import Reactor

#: Loopback addresses to try, in order.
HOSTS = (("127.0.0.1", TCP4ClientEndpoint), ("::1", TCP6ClientEndpoint))

#: Seconds that the port's owner may take to accept.
CONNECT_TIMEOUT = 10

#: Bytes that are read from the socket at a time, and that may wait for the reader.
BUFFER = 256 * 1024


@implementer(IHalfCloseableProtocol, IPushProducer)
class Outgoing(Protocol):
    """
    An open connection. One coroutine reads, one writes.

    :ivar error: what has broken it, or None.
    """

    transport: Connection

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._chunks: list[bytes] = []
        self._size = 0
        self._read_all = False
        self._lost = False
        self._paused = False
        self._reader: Deferred[None] | None = None
        self._writer: Deferred[None] | None = None

    def connectionMade(self) -> None:
        """Set the buffer's size, and register this as the producer: the port's owner has accepted."""
        self.transport.bufferSize = BUFFER
        self.transport.setTcpNoDelay(True)
        self.transport.registerProducer(self, True)

    async def read(self) -> bytes:
        """Return bytes as soon as some have arrived; nothing at the end, or when the connection broke."""
        if not (self._chunks or self._read_all):
            self._reader = Deferred()
            await self._reader
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        if self._size >= BUFFER and not self._lost:
            self.transport.resumeProducing()
        self._size = 0
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes, and wait until they are taken; drop them if the connection is gone."""
        if not self._lost:
            self.transport.write(data)
        if self._paused and not self._lost:
            self._writer = Deferred()
            await self._writer

    def end(self) -> None:
        """Send the end of the stream after what was written; reading goes on."""
        if not self._lost:
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()

    def close(self) -> None:
        """Close at once; bytes that were written and not sent are lost."""
        if not self._lost:
            self.transport.abortConnection()

    def finish(self) -> None:
        """Close when all bytes are written."""
        if not self._lost:
            self.transport.unregisterProducer()
            self.transport.loseConnection()

    def dataReceived(self, data: bytes) -> None:
        """Keep bytes for the reader, and pause the connection while it has many."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= BUFFER:
            self.transport.pauseProducing()
        self._wake_reader()

    def readConnectionLost(self) -> None:
        """Wake the reader: the other side will send no more."""
        self._read_all = True
        self._wake_reader()

    def writeConnectionLost(self) -> None:
        """
        Do nothing: all that was written has been sent, with the end of the stream, or the other side reads no more.
        """

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Wake the reader and the writer: the connection is gone."""
        if not reason.check(ConnectionDone):
            self.error = reason.value
        self._lost = self._read_all = True
        self._wake_reader()
        self.resumeProducing()

    def pauseProducing(self) -> None:
        """Make the writer wait: the other side reads more slowly than this one writes."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Let the writer go on."""
        self._paused = False
        writer, self._writer = self._writer, None
        if writer is not None and not writer.called:
            writer.callback(None)

    def stopProducing(self) -> None:
        """Do nothing: :meth:`connectionLost` follows."""

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)


async def connect(reactor: Reactor, port: int) -> Outgoing:
    """
    Connect to a port of the loopback interface, by IPv4 or else IPv6.

    :raise ConnectError: if no address accepts.
    """
    factory = Factory.forProtocol(Outgoing)
    factory.noisy = False
    error: ConnectError | None = None
    for host, endpoint in HOSTS:
        try:
            return cast(Outgoing, await endpoint(reactor, host, port, timeout=CONNECT_TIMEOUT).connect(factory))
        except ConnectingCancelledError:
            raise CancelledError from None
        except ConnectError as failed:
            error = error or failed
    assert error is not None
    raise error
