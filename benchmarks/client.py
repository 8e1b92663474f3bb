"""
A raw HTTP/1.1 client for load: keep-alive connections, requests that are made beforehand, replies received in place.

Nothing here parses a body while a clock runs; :meth:`Connection.body` takes the framing off afterwards.
"""

from __future__ import annotations

import json
import re
import select
import socket
from collections.abc import Callable, Iterable
from time import perf_counter

#: Seconds without a byte after which a server counts as hung.
PATIENCE = 20.0

Address = tuple[str, int]


_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.I)


class Failed(Exception):
    """A server did not do what the contract says; the text is the reason that the table gives."""


class NoRoute(Failed):
    """A server has no such route."""


def request(method: str, path: str, secret: str, body: object = None) -> bytes:
    """
    The bytes of a request.

    :param body: sent as JSON; bytes are sent as they are.
    """
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode("ascii")
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n"
    if content or method in ("POST", "PUT"):
        head += f"Content-Length: {len(content)}\r\n"
    return head.encode("ascii") + b"\r\n" + content


class Connection:
    """
    One keep-alive connection, with one request on its way at a time.

    :param buffer: where replies are received; it is extended if one does not fit.
    :ivar socket: the socket, blocking with a timeout of ``PATIENCE``.
    :ivar over: whether the reply is complete.
    """

    def __init__(self, address: Address, buffer: bytearray | None = None) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 16) if buffer is None else buffer
        self._begin()

    def _begin(self) -> None:
        self._end = self._head = 0
        self._stop: int | None = None
        self._chunked = self.over = False

    def send(self, data: bytes) -> None:
        """Send a request."""
        self._begin()
        self.socket.sendall(data)

    def receive(self) -> bool:
        """
        Take what has arrived, once; whether the reply is complete.

        :raise Failed: if the server has closed the connection before.
        """
        if self._end == len(self._buffer):
            self._buffer.extend(bytes(len(self._buffer)))
        count = self.socket.recv_into(memoryview(self._buffer)[self._end :])
        self._end += count
        if not self._head:
            self._read_head()
        if not count:
            if not self._head or self._stop is not None or self._chunked:
                raise Failed(f"the connection was closed after {self._end} bytes of a reply")
            self.over = True
        elif self._stop is not None:
            self.over = self._end >= self._stop
        else:
            self.over = self._chunked and self._buffer[self._end - 7 : self._end] == b"\r\n0\r\n\r\n"
        return self.over

    def _read_head(self) -> None:
        end = self._buffer.find(b"\r\n\r\n", 0, self._end)
        if end >= 0:
            self._head = end + 4
            head = self._buffer[: self._head]
            length = _LENGTH.search(head)
            self._stop = self._head + int(length[1]) if length else None
            self._chunked = _CHUNKED.search(head) is not None

    def finish(self) -> None:
        """Receive the rest of the reply."""
        while not self.over:
            self.receive()

    def call(self, data: bytes) -> None:
        """Send a request, and receive the whole reply."""
        self.send(data)
        self.finish()

    def wait_for(self, text: bytes) -> None:
        """
        Receive until ``text`` has come.

        :raise Failed: if the reply ends without it.
        """
        while not self.holds(text):
            if self.over:
                raise Failed(f"the reply ended without {text!r}: {self.status}, {self.body()[:300]!r}")
            self.receive()

    def holds(self, text: bytes) -> bool:
        """Whether ``text`` is in what was received of a reply; cheap for small ones."""
        return self._buffer.find(text, 0, self._end) >= 0

    @property
    def status(self) -> int:
        """The reply's status."""
        return int(self._buffer[9:12])

    def body(self) -> bytes:
        """A copy of the complete reply's body."""
        if not self._chunked:
            return bytes(self._buffer[self._head : self._end])
        pieces: list[memoryview] = []
        at, whole = self._head, memoryview(self._buffer)
        while True:
            line = self._buffer.find(b"\r\n", at, self._end)
            size = int(self._buffer[at:line], 16)
            if not size:
                return b"".join(pieces)
            pieces.append(whole[line + 2 : line + 2 + size])
            at = line + 4 + size

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Rate:
    """
    What a closed loop did.

    :ivar count: replies.
    :ivar seconds: for how long.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self.count = count
        self.seconds = seconds

    @property
    def per_second(self) -> float:
        """Replies per second."""
        return self.count / self.seconds


def percentiles(times: list[float]) -> tuple[float, float]:
    """The 50th and the 99th, in milliseconds, of seconds."""
    times.sort()
    return times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000


def one_by_one(
    connection: Connection, data: bytes, count: int, check: Callable[[Connection], bool]
) -> tuple[float, float]:
    """
    Send a request over and over, one at a time.

    :return: p50 and p99 of the time until its reply is complete, in milliseconds.
    :raise Failed: if a reply is not right.
    """
    times = []
    for _ in range(count):
        began = perf_counter()
        connection.call(data)
        times.append(perf_counter() - began)
        if not check(connection):
            raise Failed(f"wrong reply: {connection.body()[:200]!r}")
    return percentiles(times)


def closed_loop(
    connections: list[Connection], requests: list[bytes], seconds: float, check: Callable[[Connection], bool]
) -> Rate:
    """
    Send requests for so long, on each connection the next one as soon as the reply to the last is complete.

    :param requests: what each connection sends, over and over.
    :param check: whether a reply is right.
    :raise Failed: if one is not, or none comes for ``PATIENCE`` seconds.
    """
    poll = select.epoll()
    by_fd = {
        connection.socket.fileno(): (connection, data) for connection, data in zip(connections, requests, strict=True)
    }
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    count, busy = 0, len(connections)
    began = now = perf_counter()
    for connection, data in by_fd.values():
        connection.send(data)
    while busy:
        ready = poll.poll(PATIENCE)
        if not ready:
            raise Failed(f"no reply within {PATIENCE:.0f} s")
        now = perf_counter()
        for fd, _ in ready:
            connection, data = by_fd[fd]
            if not connection.receive():
                continue
            if not check(connection):
                raise Failed(f"wrong reply: {connection.body()[:200]!r}")
            count += 1
            if now - began < seconds:
                connection.send(data)
            else:
                busy -= 1
    poll.close()
    return Rate(count, perf_counter() - began)


def receive_all(connections: Iterable[Connection]) -> None:
    """
    Receive whole replies on many connections at a time.

    :raise Failed: if nothing comes on any for ``PATIENCE`` seconds.
    """
    poll = select.epoll()
    by_fd = {connection.socket.fileno(): connection for connection in connections}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    while by_fd:
        ready = poll.poll(PATIENCE)
        if not ready:
            raise Failed(f"{len(by_fd)} streams did not end: silent for {PATIENCE:.0f} s")
        for fd, _ in ready:
            if by_fd[fd].receive():
                poll.unregister(fd)
                del by_fd[fd]
    poll.close()
