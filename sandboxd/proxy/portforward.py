"""
The TCP proxy: connections to one port are forwarded to another, which can be changed at any time.

After the shape of ``twisted.protocols.portforward``, with what that lacks: half-close in both directions, a target
that may listen on IPv4 or IPv6, and an answer when there is none. Once two connections are joined, the kernel moves
their bytes (:mod:`sandboxd.proxy.splicing`); where it cannot, they are read and written here.
"""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.error import ConnectError, ConnectingCancelledError, ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IHalfCloseableProtocol,
    IProtocol,
    IProtocolFactory,
    IReactorFDSet,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.tcp import Connection
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.proxy.splicing import PipePool, SplicedSocket, can_splice, splice
from sandboxd.reactor.interfaces import Reactor

#: Where the target is looked for, in turn.
HOSTS = (("127.0.0.1", TCP4ClientEndpoint), ("::1", TCP6ClientEndpoint))

#: Seconds that the target may take to accept.
CONNECT_TIMEOUT = 10


@implementer(IHalfCloseableProtocol)
class Side(Protocol):
    """One of the two connections of a forwarded one. What it receives is written to its peer."""

    transport: Connection
    peer: Side | None = None
    copied: Callable[[int], None]
    _ends: tuple[SplicedSocket, ...] = ()
    _read_closed = False
    _lost = False

    def splice(self, peer: Side, reactor: IReactorFDSet, pool: PipePool) -> None:
        """Let the kernel forward, both ways, until each side has ended or one breaks."""
        self.peer, peer.peer = peer, self
        peer.transport.pauseProducing()
        self._ends = peer._ends = splice(
            reactor, pool, self.transport.getHandle(), peer.transport.getHandle(), self._spliced
        )

    def _spliced(self, error: BaseException | None) -> None:
        peer, self.peer = self.peer, None
        assert peer is not None
        peer.peer = None
        for side in (self, peer):
            if error is None:
                side.transport.loseConnection()
            else:
                side.transport.abortConnection()

    def abort(self) -> None:
        """Break it off, and with it the other side."""
        for end in self._ends:
            end.stop()
        self.transport.abortConnection()

    def join(self, peer: Side) -> None:
        """Forward what this side receives to ``peer``, no faster than that takes it."""
        self.peer = peer
        peer.transport.registerProducer(self.transport, True)

    def dataReceived(self, data: bytes) -> None:
        """Bytes came from this side."""
        if self.peer is not None:
            self.copied(len(data))
            self.peer.transport.write(data)

    def readConnectionLost(self) -> None:
        """This side has sent its FIN: pass it on to the other side, and go on with the other direction."""
        self._read_closed = True
        peer = self.peer
        if peer is None or peer._lost:
            return
        peer.transport.unregisterProducer()
        if peer._read_closed:
            self._close()
            peer._close()
        else:
            peer.transport.loseWriteConnection()

    def writeConnectionLost(self) -> None:
        """What was written to this side has all been sent, and the end of it."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """This side is gone."""
        self._lost = True
        peer, self.peer = self.peer, None
        if peer is None or peer._lost:
            return
        if self._ends:
            peer.abort()
            return
        peer.transport.unregisterProducer()
        if reason.check(ConnectionDone):
            peer._close()
        else:
            peer.transport.abortConnection()

    def _close(self) -> None:
        """Close when all is written."""
        self.transport.resumeProducing()
        self.transport.loseConnection()


_OUTGOING = Factory.forProtocol(Side)
_OUTGOING.noisy = False  # or each connection would be logged twice


class ProxyConnection(Side):
    """A client's connection, waiting for its counterpart."""

    factory: PortForward
    _connecting: Deferred[IProtocol] | None = None

    def connectionMade(self) -> None:
        """A client has connected."""
        self.factory.connections.add(self)
        self.factory.accepted += 1
        if self.factory.port is None:
            self.transport.loseConnection()
            return
        self.transport.pauseProducing()
        Deferred.fromCoroutine(self._connect(self.factory.port)).addErrback(self._failed)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The client is gone."""
        self.factory.connections.discard(self)
        super().connectionLost(reason)
        if self._connecting is not None:
            self._connecting.cancel()

    async def _connect(self, port: int) -> None:
        for host, endpoint in HOSTS:
            attempt = endpoint(self.factory.reactor, host, port, timeout=CONNECT_TIMEOUT)
            connecting: Deferred[IProtocol] = attempt.connect(_OUTGOING)
            self._connecting = connecting
            try:
                outgoing = await connecting
            except ConnectError:
                continue
            finally:
                self._connecting = None
            assert isinstance(outgoing, Side)
            if self._lost:
                outgoing.transport.abortConnection()
                return
            if self.factory.pool is not None:
                self.splice(outgoing, self.factory.reactor, self.factory.pool)
                return
            self.copied = outgoing.copied = self.factory.count_copied
            self.join(outgoing)
            outgoing.join(self)
            self.transport.resumeProducing()
            return
        self.transport.loseConnection()

    def _failed(self, failure: Failure) -> None:
        if not failure.check(CancelledError, ConnectingCancelledError):
            self.factory.log.failure("a connection could not be forwarded", failure)
        if not self._lost:
            self.transport.abortConnection()


@implementer(IProtocolFactory)
class PortForward:
    """
    Forwards each connection to the port that is bound when it arrives.

    A new binding serves new connections; those that are open go on as they are.

    :ivar port: the port that is bound, or None.
    :ivar connections: the clients that are connected.
    :ivar accepted: how many there have been.
    """

    log = Logger()

    def __init__(self, reactor: Reactor, splicing: bool = True) -> None:
        """
        Forward nothing yet.

        :param splicing: whether to let the kernel move the bytes, if it can.
        """
        self.reactor = reactor
        self.accepted = 0
        self._copied = 0
        self.pool = PipePool() if splicing and can_splice() else None
        self.port: int | None = None
        self.connections: set[ProxyConnection] = set()

    def buildProtocol(self, addr: IAddress | None) -> ProxyConnection:
        """A client has connected."""
        incoming = ProxyConnection()
        incoming.factory = self
        return incoming

    def doStart(self) -> None:
        """A port begins to listen."""

    def doStop(self) -> None:
        """A port no longer listens."""

    @property
    def forwarded(self) -> int:
        """Bytes that were forwarded, in both directions."""
        return self._copied + (0 if self.pool is None else self.pool.moved)

    def count_copied(self, size: int) -> None:
        """Some bytes were forwarded without the kernel's help."""
        self._copied += size

    def bind(self, port: int) -> None:
        """Forward new connections to ``port``."""
        self.port = port

    def unbind(self) -> None:
        """Forward no new connections."""
        self.port = None

    def close_all(self) -> None:
        """End every forwarded connection."""
        for incoming in list(self.connections):
            incoming.abort()
        if self.pool is not None:
            self.pool.close()
