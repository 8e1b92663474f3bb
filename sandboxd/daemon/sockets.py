"""The sockets that the daemon listens on: ports, paths, and those that a service manager has opened for it."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from twisted.internet import tcp, unix
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IReactorTime
from twisted.logger import Logger

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096

#: Seconds until the next attempt to accept if no descriptor was left, and at least between two messages about that.
RETRY = 0.1
QUIET = 60.0

#: accept(2) fails for lack of descriptors or memory.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ListeningSocket:
    """
    A listening socket.

    :param sock: the socket.
    :param path: where we have made it, if it is to be removed at the end.
    :ivar port: its TCP port, or None if it is a Unix socket.
    """

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        self._sock = _Socket(sock)
        self._path = path
        self._inode = None if path is None else os.lstat(path).st_ino
        self.port: int | None = None if self._sock.family == socket.AF_UNIX else self._sock.getsockname()[1]

    def __str__(self) -> str:
        return f"port {self.port}" if self.port is not None else f"unix:{self._sock.getsockname()}"

    def serve(
        self, reactor: IReactorTime, factory: IProtocolFactory, transport: Callable[..., object] | None = None
    ) -> IListeningPort:
        """
        Accept connections. Can be called once.

        :param transport: makes the transport of each, as a :class:`twisted.internet.tcp.Port` has it; None for
            Twisted's own.
        """
        unix_socket = self._sock.family == socket.AF_UNIX
        port: Any = (_UnixPort if unix_socket else _TCPPort)(reactor, self._sock, factory)
        port.startListening()
        if transport is not None:
            port.transport = transport
        return cast(IListeningPort, port)

    def close(self) -> None:
        """Close the socket, if it is not served."""
        self._sock.close()

    def remove(self) -> None:
        """Remove the socket's path, if this process has made it and it is still the same."""
        if self._path is not None:
            with suppress(OSError):
                if os.lstat(self._path).st_ino == self._inode:
                    self._path.unlink()


class _Socket(socket.socket):
    """
    A listening socket that does not block, with a descriptor in reserve for when there is no other left.

    Connections that cannot be accepted are closed then, by means of the reserve: else their clients would wait, and the
    reactor would not. Twisted has such a reserve too, but gives it up for good, with a traceback, if a thread takes the
    descriptor meanwhile.

    :param sock: the socket to take over.
    :ivar stuck: whether connections wait that could neither be accepted nor closed.
    :ivar closed: how many connections were closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.setblocking(False)
        self.stuck = False
        self.closed = 0
        self._reserve = -1
        self._take_reserve()

    def accept(self) -> tuple[socket.socket, Any]:
        """
        Accept a connection.

        :raise BlockingIOError: if there is none, or none can be accepted; see :attr:`stuck`.
        """
        self.stuck = False
        self._take_reserve()
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _EXHAUSTED:
                raise
        self._release_reserve()
        try:
            for _ in range(BACKLOG):
                super().accept()[0].close()
                self.closed += 1
        except OSError as error:
            self.stuck = error.errno in _EXHAUSTED
        self._take_reserve()
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def close(self) -> None:
        """Close the socket and the reserve."""
        self._release_reserve()
        super().close()

    def _take_reserve(self) -> None:
        if self._reserve < 0:
            with suppress(OSError):  # a thread has taken the last one: at the next attempt
                self._reserve = os.open("/", os.O_PATH | os.O_CLOEXEC)

    def _release_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1


class _AcceptingLater:
    """What both kinds of ports do if no connection can be accepted: wait, as the reactor would ask again at once."""

    _descriptors_log = Logger()
    _warned_at = -QUIET

    def doRead(self: Any) -> None:
        """Accept connections."""
        closed = self.socket.closed
        super().doRead()  # type: ignore[misc]
        if not self.connected:
            return
        now = self.reactor.seconds()
        if (self.socket.stuck or self.socket.closed > closed) and now - self._warned_at >= QUIET:
            self._warned_at = now
            self._descriptors_log.warn("connections are not accepted, as there is no descriptor or no memory left")
        if self.socket.stuck:
            self.stopReading()
            self.reactor.callLater(RETRY, self._accept_again)

    def _accept_again(self: Any) -> None:
        if self.connected and not self.disconnecting:
            self.startReading()


class _TCPPort(_AcceptingLater, tcp.Port):
    """A listening port on a TCP socket that exists already."""

    def __init__(self, reactor: IReactorTime, sock: _Socket, factory: IProtocolFactory) -> None:
        super().__init__(0, factory, BACKLOG, sock.getsockname()[0], reactor)
        self._preexistingSocket = sock


class _UnixPort(_AcceptingLater, unix.Port):
    """
    A listening port on a Unix socket that exists already.

    ``adoptStreamPort`` would open it to all (mode 0666), and at the end remove it and shut it down, even if the service
    manager goes on listening there. Twisted does not touch an abstract socket name, so it is given one.
    """

    def __init__(self, reactor: IReactorTime, sock: _Socket, factory: IProtocolFactory) -> None:
        super().__init__(b"\0", factory, BACKLOG, reactor=reactor)
        self._preexistingSocket = sock
        self._shouldShutdown = False


def listen_on_port(port: int) -> ListeningSocket:
    """
    Listen for IPv6 and IPv4, or for IPv4 where that is all there is.

    :raise OSError: if the port cannot be had.
    """
    if socket.has_dualstack_ipv6():
        sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        sock = socket.create_server(("", port), backlog=BACKLOG)
    return ListeningSocket(sock)


def listen_at(path: Path) -> ListeningSocket:
    """
    Listen on a Unix socket for the daemon's user and group (mode 0660).

    One that a daemon has left behind which is gone is replaced; whatever else is there is left alone.

    :raise OSError: if that cannot be done; EADDRINUSE if another process listens there.
    """
    if _is_stale(path):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o117)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(umask)
    sock.listen(BACKLOG)
    return ListeningSocket(sock, path)


def _is_stale(path: Path) -> bool:
    """Return whether a path is a socket on which no process listens any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except (FileNotFoundError, BlockingIOError):
        pass
    return False
