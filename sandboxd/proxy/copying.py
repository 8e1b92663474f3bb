"""
Copying between two connected sockets through a buffer of this process: the quickest way for few bytes.

Where much comes, :mod:`sandboxd.proxy.splicing` is quicker, and can take the sockets over.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor, IWriteDescriptor
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure
from zope.interface import implementer

#: Bytes that are read at a time. A read that fills the buffer is taken as a sign that much more will come.
SIZE = 64 * 1024

#: The buffer of all sockets. It holds nothing between two calls, which one thread makes.
_BUFFER = memoryview(bytearray(SIZE))


@implementer(IReadDescriptor, IWriteDescriptor)
class CopiedSocket:
    """
    One of two connected sockets, as the reactor watches it: what is read from it is written to its peer.

    :ivar peer: the other one.
    :ivar ended: whether its end of file was passed on to its peer.
    :ivar passed: the number of bytes that its peer has taken.
    :ivar waiting: bytes that its peer has yet to take. As long as there are some, no more are read from it.
    """

    peer: CopiedSocket

    def __init__(
        self,
        reactor: IReactorFDSet,
        sock: socket.socket,
        count: Callable[[int], None],
        much: Callable[[], None] | None,
        done: Callable[[BaseException | None], None],
    ) -> None:
        """
        Prepare to watch a socket from :meth:`start` on. The caller keeps it, and must call :meth:`stop` before closing
        it.

        :param sock: does not block.
        :param count: is called with the number of bytes that were passed on.
        :param much: is called when much comes and nothing waits in either direction; it may stop both sockets and pass
            them on. None: copy however much comes.
        :param done: called once for both sockets: with None when both have ended and all bytes have arrived, or with
            the error of one of them.
        """
        self._reactor = reactor
        self._socket = sock
        # The reactor takes a selectable whose fileno() changes while it calls it for a broken one.
        self._fd = sock.fileno()
        self._stopped = False
        self._count = count
        self._much = much
        self._done = done
        self._filled = False
        self.ended = False
        self.passed = 0
        self.waiting = b""

    def start(self) -> None:
        """Start watching the socket."""
        self._reactor.addReader(self)

    def stop(self) -> None:
        """Stop watching the socket."""
        if not self._stopped:
            self._stopped = True
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._fd

    def logPrefix(self) -> str:
        """Return the name in the reactor's own messages."""
        return type(self).__name__

    def connectionLost(self, reason: Failure) -> None:
        """
        End both sockets, as the reactor has met an error of this one while only writing was waited for.

        It may also hold an event for the descriptor's number from before this one had it; then it is watched again.
        """
        poll = select.poll()
        poll.register(self._fd, 0)  # errors and hang-ups are always shown
        if poll.poll(0):
            self._finish(reason.value or CONNECTION_LOST)
            return
        if self.peer.waiting:
            self._reactor.addWriter(self)
        if not (self.waiting or self.ended):
            self._reactor.addReader(self)

    def doRead(self) -> None:
        """Pass on the bytes that have arrived, or the end of the stream."""
        try:
            size = self._socket.recv_into(_BUFFER)
            if not size:
                self._pass_on_end()
                return
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(error)
            return
        self._filled = self._filled or size == SIZE
        self._pass_on(_BUFFER[:size])

    def doWrite(self) -> None:
        """Write the bytes that the peer has sent."""
        if self.peer.waiting:
            self.peer._pass_on(self.peer.waiting)

    def _pass_on(self, data: memoryview | bytes) -> None:
        """Send bytes to the peer; keep those that it does not take, and read no more until it does."""
        try:
            sent = self.peer._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._finish(error)
            return
        self._count(sent)
        self.passed += sent
        waited, self.waiting = bool(self.waiting), bytes(data[sent:])
        if self.waiting and not waited:
            self._reactor.removeReader(self)
            self._reactor.addWriter(self.peer)
        elif waited and not self.waiting:
            self._reactor.removeWriter(self.peer)
            self._reactor.addReader(self)
        if self._filled and self._much is not None and not (self.waiting or self.peer.waiting):
            self._much()

    def _pass_on_end(self) -> None:
        """
        Shut down the peer for writing, as all bytes of this socket were passed on.

        :raise OSError: if the peer is gone.
        """
        self.ended = True
        self._reactor.removeReader(self)
        if self.peer.ended:
            self._finish(None)
        else:
            self.peer._socket.shutdown(socket.SHUT_WR)

    def _finish(self, error: BaseException | None) -> None:
        if not self._stopped:
            self.stop()
            self.peer.stop()
            self._done(error)


def copy(
    reactor: IReactorFDSet,
    one: socket.socket,
    other: socket.socket,
    count: Callable[[int], None],
    much: Callable[[], None] | None,
    done: Callable[[BaseException | None], None],
) -> tuple[CopiedSocket, CopiedSocket]:
    """
    Copy bytes between two sockets, both ways, half-close included, until both have ended.

    :param count: this and the others as :class:`CopiedSocket` has them.
    """
    ends = CopiedSocket(reactor, one, count, much, done), CopiedSocket(reactor, other, count, much, done)
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for end in ends:
        end.start()
    return ends
