"""
Connected sockets that coroutines read and write without one of Twisted's transports, so that their bytes can be
spliced.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.defer import Deferred
from twisted.internet.error import getConnectError
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.proxy.splicing import PIPE_SIZE, Pipe, PipePool
from sandboxd.reactor.interfaces import Reactor

#: Where a port is looked for, in turn.
HOSTS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

#: Seconds that the port's owner may take to accept at each.
CONNECT_TIMEOUT = 10

#: The SO_LINGER with which close(2) sends a RST: what has arrived must not be taken for all there is.
RESET = struct.pack("ii", 1, 0)

#: Bytes that are read at a time.
SIZE = 256 * 1024

#: What is read passes through here. One for all: it holds nothing between two calls, which one thread makes.
_BUFFER = memoryview(bytearray(SIZE))


@implementer(IReadDescriptor, IWriteDescriptor)
class SocketStream:
    """
    A connected socket. One coroutine reads, one writes; nothing is read before it is asked for, and nothing is queued.

    Each read and each block that is spliced takes a turn of the reactor, so that a quick peer starves nobody.

    :ivar socket: it does not block, and belongs to this object.
    :ivar error: what has broken it, or None.
    """

    def __init__(self, reactor: Reactor, sock: socket.socket) -> None:
        self._reactor = reactor
        self.socket = sock
        self._fd = sock.fileno()  # the reactor must find it until :meth:`close`, also in a broken socket
        self.error: BaseException | None = None
        self._write_broken = False
        self._closed = False
        self._reader: Deferred[None] | None = None
        self._writer: Deferred[None] | None = None

    @property
    def broken(self) -> bool:
        """Whether nothing more can be written."""
        return self._write_broken or self._closed

    async def read(self) -> bytes:
        """Return bytes as soon as some have arrived; nothing at the end, or when the connection broke."""
        while not self._closed:
            await self.readable()
            try:
                return bytes(_BUFFER[: self.socket.recv_into(_BUFFER)])
            except BlockingIOError:
                continue
            except OSError as error:
                self.error = self.error or error
                break
        return b""

    async def write(self, data: bytes) -> None:
        """Send bytes, and wait until the kernel has taken them; drop them if the other side reads no more."""
        rest = memoryview(data)
        while rest and not self.broken:
            try:
                rest = rest[self.socket.send(rest) :]
            except BlockingIOError:
                await self.writable()
            except OSError as error:
                self._break_writing(error)

    async def splice_to(
        self,
        sink: SocketStream,
        pool: PipePool,
        limit: int | None,
        count: Callable[[int], None],
        chunked: bool = False,
    ) -> None:
        """
        Have the kernel move bytes from this socket to another, until the end of the stream, or until either breaks.

        :param limit: most bytes to move, or None.
        :param count: called with the number of bytes of each block, when that was read and not written yet.
        :param chunked: whether to make each block a chunk of HTTP's transfer coding.
        """
        left = limit
        while left != 0 and not (self._closed or sink.broken):
            await self.readable()
            try:
                pipe = pool.take()
            except OSError:  # no descriptor is left: who has called can copy
                return
            try:
                pipe.filled = _splice(self._fd, pipe.writer, PIPE_SIZE if left is None else min(left, PIPE_SIZE))
                if not pipe.filled:
                    return
                left = None if left is None else left - pipe.filled
                count(pipe.filled)
                if chunked:
                    await sink.write(b"%x\r\n" % pipe.filled)
                while pipe.filled and not sink.broken:
                    await sink._take(pipe, pool)
                if chunked:
                    await sink.write(b"\r\n")
            except BlockingIOError:
                continue
            except OSError as error:
                self.error = self.error or error
                return
            finally:
                pool.give_back(pipe)

    async def _take(self, pipe: Pipe, pool: PipePool) -> None:
        """Write some of the bytes in a pipe."""
        try:
            count = _splice(pipe.reader, self._fd, pipe.filled)
        except BlockingIOError:
            await self.writable()
        except OSError as error:
            self._break_writing(error)
        else:
            pipe.filled -= count
            pool.moved += count

    async def readable(self) -> None:
        """Wait until there are bytes to read, or the end, or an error."""
        if not self._closed:
            self._reader = Deferred()
            self._reactor.addReader(self)
            await self._reader

    async def writable(self) -> None:
        """Wait until bytes can be written, or nothing more can be."""
        if not self._closed:
            self._writer = Deferred()
            self._reactor.addWriter(self)
            try:
                await self._writer
            finally:
                self._reactor.removeWriter(self)

    def end(self) -> None:
        """Send the end of the stream after what was written; reading goes on."""
        if not self._closed:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        """Stop watching the socket, which can be handed on. Coroutines that wait go on as at the end of the stream."""
        if not self._closed:
            self._closed = True
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._wake_reader()
            self._wake_writer()

    def finish(self) -> None:
        """Close the connection; bytes that were written still arrive."""
        self.stop()
        self.socket.close()

    async def linger(self, seconds: float) -> None:
        """
        Send the end of the stream, drop what arrives until the other side ends it too, and close the connection.

        If it were closed first, the next bytes to arrive would reset it, and what the other side has not read be lost.

        :param seconds: after which to close it in any case.
        """
        self.end()
        timeout = self._reactor.callLater(seconds, self.stop)
        while await self.read():
            pass
        if timeout.active():
            timeout.cancel()
        self.finish()

    def close(self) -> None:
        """Close the connection at once; bytes that were written may be lost."""
        self.stop()
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._fd

    def logPrefix(self) -> str:
        """Return the name in the reactor's own messages."""
        return type(self).__name__

    def doRead(self) -> None:
        """Wake the reader, or stop watching if none waits."""
        if self._reader is None:
            self._reactor.removeReader(self)
        self._wake_reader()

    def doWrite(self) -> None:
        """Wake the writer."""
        self._wake_writer()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Wake the reader and the writer, who will meet the error: the socket has hung up."""
        self._wake_reader()
        self._wake_writer()

    def _break_writing(self, error: OSError) -> None:
        """Stop writing; bytes that have arrived can still be read, unless the connection is broken."""
        self._write_broken = True
        if error.errno != errno.EPIPE:
            self.error = self.error or error

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.called:
            writer.callback(None)


def _splice(source: int, target: int, size: int) -> int:
    return os.splice(source, target, size, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)


async def connect(reactor: Reactor, port: int) -> SocketStream:
    """
    Connect to a port of the loopback interface, by IPv4 or else IPv6.

    :raise twisted.internet.error.ConnectError: if nobody accepts.
    """
    first: OSError | None = None
    for family, host in HOSTS:
        try:
            return await _connect(reactor, family, host, port)
        except OSError as error:
            first = first or error
    assert first is not None
    raise getConnectError(first)


async def _connect(reactor: Reactor, family: int, host: str, port: int) -> SocketStream:
    """
    Connect to one address.

    :raise OSError: if nobody accepts.
    """
    stream = SocketStream(reactor, socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    try:
        code = stream.socket.connect_ex((host, port))
        if code == errno.EINPROGRESS:
            code = stream.socket.connect_ex((host, port))  # over loopback, it is done by now
        if code == errno.EALREADY:
            code = await _outcome(reactor, stream)
        if code not in (0, errno.EISCONN):
            raise OSError(code, os.strerror(code))
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        stream.close()
        raise
    return stream


async def _outcome(reactor: Reactor, stream: SocketStream) -> int:
    """Return the error number of an attempt to connect once that is over, 0 for success."""
    timeout = reactor.callLater(CONNECT_TIMEOUT, stream.stop)
    try:
        await stream.writable()
    finally:
        if timeout.active():
            timeout.cancel()
    if stream.broken:
        return errno.ETIMEDOUT
    return stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
