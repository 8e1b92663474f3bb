"""The sockets that the daemon listens on: ports, paths, and those that a service manager has opened for it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from twisted.internet import unix
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IReactorSocket
from twisted.internet.protocol import ServerFactory

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096


class ListeningSocket:
    """
    A listening socket.

    :param sock: the socket.
    :param path: where we have made it, if it is to be removed at the end.
    :ivar port: its TCP port, or None if it is a Unix socket.
    """

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._path = path
        self._inode = None if path is None else os.lstat(path).st_ino
        self.port: int | None = None if sock.family == socket.AF_UNIX else sock.getsockname()[1]

    def __str__(self) -> str:
        return f"port {self.port}" if self.port is not None else f"unix:{self._sock.getsockname()}"

    def serve(
        self, reactor: IReactorSocket, factory: IProtocolFactory, transport: Callable[..., object] | None = None
    ) -> IListeningPort:
        """
        Accept connections. Can be called once.

        :param transport: makes the transport of each, as a :class:`twisted.internet.tcp.Port` has it; None for
            Twisted's own.
        """
        port: Any
        if self._sock.family == socket.AF_UNIX:
            port = _UnixPort(reactor, self._sock, factory)
            port.startListening()
        else:
            port = reactor.adoptStreamPort(self._sock.fileno(), self._sock.family, cast("ServerFactory[Any]", factory))
            self._sock.close()  # the port has a duplicate
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


class _UnixPort(unix.Port):
    """
    A listening port on a Unix socket that exists already.

    ``adoptStreamPort`` would open it to all (mode 0666), and at the end remove it and shut it down, even if the service
    manager goes on listening there. Twisted does not touch an abstract socket name, so it is given one.
    """

    def __init__(self, reactor: IReactorSocket, sock: socket.socket, factory: IProtocolFactory) -> None:
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
