"""A TCP proxy that cuts its connections: what networks do."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class CuttingProxy:
    """
    Forwards to a local port, in threads.

    :ivar url: where it listens.
    :ivar server_port: the port that connections to come are forwarded to.
    :ivar cuts: for each connection to come, the bytes after which it is cut, both directions counted; beyond the list
        none is.
    :ivar connections: how many there have been.
    :ivar forwarded: the bytes that reached the server, of all connections.
    """

    def __init__(self, port: int, cuts: list[int] | None = None) -> None:
        self.server_port = port
        self.cuts = cuts or []
        self.connections = 0
        self.forwarded = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        # Little is on its way when a connection is cut: what a client sends anew is what was not stored.
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        self.port = self._server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._spawn(self._accept)

    def cut(self) -> None:
        """Cut all connections that are open, without a goodbye."""
        with self._lock:
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and cut all connections."""
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        self._server.close()

    def _spawn(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            limit = self.cuts.pop(0) if self.cuts else None
            self._spawn(self._forward, client, limit)

    def _forward(self, client: socket.socket, limit: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self.server_port)) as server:
            with self._lock:
                self._open |= {client, server}
            left = limit
            try:
                while True:
                    readable, _, _ = select.select([client, server], [], [], 30)
                    for source in readable:
                        data = source.recv(65536 if left is None else min(65536, left))
                        if not data:
                            return
                        (server if source is client else client).sendall(data)
                        if source is client:
                            with self._lock:
                                self.forwarded += len(data)
                        if left is not None:
                            left -= len(data)
                            if left <= 0:
                                return
            except OSError:
                return
            finally:
                with self._lock:
                    self._open -= {client, server}
