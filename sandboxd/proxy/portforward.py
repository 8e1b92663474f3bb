"""
The TCP proxy: it forwards connections to a port, which can be changed at any time.

After the shape of ``twisted.protocols.portforward``, with what that lacks: half-close in both directions, a target
that may listen on IPv4 or IPv6, and an answer when there is none. Most connections are short, so none has Twisted's
transports or endpoints: the sockets themselves are connected, their bytes are copied (:mod:`sandboxd.proxy.copying`),
and once there are many, the kernel moves them (:mod:`sandboxd.proxy.splicing`).
"""

from __future__ import annotations

import errno
import resource
import socket
from contextlib import suppress
from typing import cast

from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocolFactory,
    IWriteDescriptor,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.proxy.both_ways import BothWays
from sandboxd.proxy.socket_stream import CONNECT_TIMEOUT, HOSTS, RESET
from sandboxd.proxy.splicing import PipePool, can_splice
from sandboxd.reactor import liveness
from sandboxd.reactor.interfaces import Reactor


def bare_socket(sock: socket.socket, *_: object) -> socket.socket:
    """
    Return an accepted socket as it is; in the place of a listening port's ``transport`` class, it makes the socket the
    protocol's transport.
    """
    return sock


@implementer(IWriteDescriptor)
class ForwardedConnection(Protocol):
    """
    A client's connection and the one to its target. The reactor watches the latter through this object until it is
    made.

    :ivar transport: the client's socket.
    """

    def __init__(self, factory: PortForward, port: int) -> None:
        """
        Prepare; :meth:`makeConnection` starts it.

        :param port: the target's.
        """
        self._factory = factory
        self._port = port
        self._addresses = iter(HOSTS)
        self._host = ""
        self._client: socket.socket | None = None
        self._target: socket.socket | None = None
        self._timeout: IDelayedCall | None = None
        self._both_ways: BothWays | None = None

    def connectionMade(self) -> None:
        """Connect to the target. The client's socket belongs to this object from now on."""
        self._client = client = cast(socket.socket, self.transport)
        self._factory.connections.add(self)
        client.setblocking(False)
        liveness.keep_alive(client)
        self._connect()

    @property
    def vanished(self) -> bool:
        """Whether the machine of the client, or of a target that is reached by a redirection, has vanished."""
        return any(sock is not None and liveness.has_vanished(sock) for sock in (self._client, self._target))

    def abort(self) -> None:
        """Close both connections at once."""
        self._close(CONNECTION_LOST)

    def fileno(self) -> int:
        """Return the descriptor that is being connected."""
        return -1 if self._target is None else self._target.fileno()

    def logPrefix(self) -> str:
        """Return the name in the reactor's own messages."""
        return type(self).__name__

    def doWrite(self) -> None:
        """Continue: the attempt to connect may be over."""
        if self._target is not None and self._both_ways is None and not self._look():
            self._connect()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Continue: the attempt to connect seems to have failed."""
        self.doWrite()

    def _connect(self) -> None:
        """Connect to the first of the remaining addresses that accepts; close if none does."""
        for family, host in self._addresses:
            self._host = host
            try:
                self._target = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            except OSError as error:  # no descriptor, or no IPv6; at debug, since it takes no token to get here
                self._factory.log.debug("a connection could not be forwarded: {error}", error=error)
                break
            if self._look():
                return
        self._close(None)

    def _look(self) -> bool:
        """Start to connect, or ask for the outcome, and act on it; return False if this address has failed."""
        assert self._target is not None
        address = (self._host, self._port)
        code = self._target.connect_ex(address)
        if code == errno.EINPROGRESS:
            code = self._target.connect_ex(address)  # over loopback, it is done by now
        if code == errno.EALREADY:
            self._factory.reactor.addWriter(self)
            if self._timeout is None:
                self._timeout = self._factory.reactor.callLater(CONNECT_TIMEOUT, self._timed_out)
            return True
        if code in (0, errno.EISCONN):
            self._stop_waiting()
            self._forward()
            return True
        self._give_up()
        return False

    def _timed_out(self) -> None:
        self._give_up()
        self._connect()

    def _give_up(self) -> None:
        self._stop_waiting()
        if self._target is not None:
            self._target.close()
            self._target = None

    def _stop_waiting(self) -> None:
        timeout, self._timeout = self._timeout, None
        if timeout is not None:
            self._factory.reactor.removeWriter(self)
            if timeout.active():
                timeout.cancel()

    def _forward(self) -> None:
        """Forward both ways until both sides have ended, or one breaks."""
        assert self._client is not None
        assert self._target is not None
        liveness.keep_alive(self._target)
        factory = self._factory
        self._both_ways = BothWays(
            factory.reactor, factory.pool, self._client, self._target, factory.count_copied, self._close
        )

    def _close(self, error: BaseException | None) -> None:
        """
        Close both connections.

        :param error: if there is one, with a RST.
        """
        self._factory.connections.discard(self)
        self._stop_waiting()
        if self._both_ways is not None:
            self._both_ways.stop()
        for sock in (self._client, self._target):
            if sock is not None:
                if error is not None:
                    with suppress(OSError):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                sock.close()
        self._client = self._target = None


@implementer(IProtocolFactory)
class PortForward:
    """
    A factory that forwards each connection to the port that is bound when it arrives.

    A new binding serves new connections; those that are open go on as they are. A listening port that has this for a
    factory must have :func:`bare_socket` for its ``transport``.

    :ivar port: the port that is bound, or None.
    :ivar connections: the open connections.
    :ivar accepted: how many there have been, those included that came when no port was bound.
    """

    log = Logger()

    def __init__(self, reactor: Reactor, splicing: bool = True) -> None:
        """
        Forward nothing until :meth:`bind` is called.

        :param splicing: whether to let the kernel move the bytes, if it can.
        """
        self.reactor = reactor
        self.accepted = 0
        self._copied = 0
        self.pool = PipePool() if splicing and can_splice() else None
        self.port: int | None = None
        self.connections: set[ForwardedConnection] = set()
        self._looks = LoopingCall(self._abort_vanished)
        self._looks.clock = reactor

    def buildProtocol(self, addr: IAddress | None) -> ForwardedConnection | None:
        """
        Return the protocol that forwards a new connection; None, upon which the listening port closes it, if no port is
        bound.

        Also None if the open ones, of two descriptors each, have a quarter of those that this process may have: they
        need no token, and must not use up what requests need.
        """
        self.accepted += 1
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8
        return None if self.port is None or len(self.connections) >= most else ForwardedConnection(self, self.port)

    def doStart(self) -> None:
        """Start to look for peers that have vanished, as a port begins to listen."""
        if not self._looks.running:
            self._looks.start(liveness.INTERVAL, now=False).addErrback(
                lambda failure: self.log.failure("vanished clients of the proxy are no longer noticed", failure)
            )

    def doStop(self) -> None:
        """Look no more, as a port no longer listens; if there are others, their end follows."""
        if self._looks.running:
            self._looks.stop()

    def _abort_vanished(self) -> None:
        for connection in [each for each in self.connections if each.vanished]:
            connection.abort()

    @property
    def forwarded(self) -> int:
        """Bytes that were forwarded, in both directions."""
        return self._copied + (0 if self.pool is None else self.pool.moved)

    def count_copied(self, size: int) -> None:
        """Count bytes that were forwarded without the kernel's help."""
        self._copied += size

    def bind(self, port: int) -> None:
        """Forward new connections to ``port``."""
        self.port = port

    def unbind(self) -> None:
        """Forward no new connections."""
        self.port = None

    def close_all(self) -> None:
        """End every forwarded connection."""
        for connection in list(self.connections):
            connection.abort()
        if self.pool is not None:
            self.pool.close()
