"""
Splicing between two connected TCP sockets: the kernel moves the bytes, splice(2), and none is copied into this process.

A pipe lies between the sockets only while it holds something: one connection that is idle, or as fast as its reader,
costs none.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.interfaces import IReactorFDSet, IReadDescriptor, IWriteDescriptor
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure
from zope.interface import implementer

#: Bytes that a pipe is made to hold, and that are moved at a time.
PIPE_SIZE = 1024 * 1024

#: Pipes that are kept for the next one that needs one.
POOLED = 4

#: Times that one socket is read before others get their turn.
BURST = 4


class Pipe:
    """
    A pipe of the pool.

    :ivar filled: bytes in it.
    """

    def __init__(self) -> None:
        """
        Open the pipe.

        :raise OSError: if there is no descriptor to be had.
        """
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.filled = 0
        # Refused when this user's pipes hold too much already; see pipe(7).
        with suppress(OSError):
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def close(self) -> None:
        """Close the pipe, with the bytes that are in it."""
        os.close(self.reader)
        os.close(self.writer)


class PipePool:
    """
    A pool of empty pipes, to be used again.

    :ivar moved: bytes that have gone through any of them.
    """

    def __init__(self) -> None:
        self.moved = 0
        self._free: list[Pipe] = []

    def take(self) -> Pipe:
        """
        Return an empty pipe.

        :raise OSError: if there is no descriptor to be had.
        """
        return self._free.pop() if self._free else Pipe()

    def give_back(self, pipe: Pipe) -> None:
        """Take back a pipe that is no longer needed."""
        if pipe.filled or len(self._free) >= POOLED:
            pipe.close()
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close all free pipes."""
        while self._free:
            self._free.pop().close()


@implementer(IReadDescriptor, IWriteDescriptor)
class SplicedSocket:
    """
    One of two connected sockets, as the reactor watches it: what is read from it is written to its peer.

    :ivar peer: the other one.
    :ivar ended: whether its end of file was passed on to its peer.
    :ivar passed: the number of bytes that its peer has taken.
    """

    peer: SplicedSocket

    def __init__(
        self, reactor: IReactorFDSet, pool: PipePool, sock: socket.socket, done: Callable[[BaseException | None], None]
    ) -> None:
        """
        Prepare to watch a socket from :meth:`start` on. The caller keeps it, and must call :meth:`stop` before closing
        it.

        :param done: called once for both sockets: with None when both have ended and all bytes have arrived, or with
            the error of one of them.
        """
        self._reactor = reactor
        self._pool = pool
        self._socket = sock
        self._fd = sock.fileno()
        self._done = done
        self._pipe: Pipe | None = None
        self._read_all = False
        self.ended = False
        self.passed = 0

    def start(self) -> None:
        """Start watching the socket."""
        if not self.ended:
            self._reactor.addReader(self)

    def stop(self) -> None:
        """Stop watching the socket."""
        if self._fd >= 0:
            self._reactor.removeReader(self)
            self._reactor.removeWriter(self)
            self._fd = -1
            pipe, self._pipe = self._pipe, None
            if pipe is not None:
                self._pool.give_back(pipe)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def connectionLost(self, reason: Failure) -> None:
        """Read the bytes that a socket that has hung up still has, and meet its error there."""
        self._broken(reason.value)

    def doRead(self) -> None:
        for _ in range(BURST):
            if not self._move():
                break

    def doWrite(self) -> None:
        """Continue to move the bytes that the peer has sent."""
        self.peer._push()

    def _move(self) -> bool:
        """Move some bytes; return whether there may be more."""
        try:
            pipe = self._pipe = self._pool.take()
            count = os.splice(self._fd, pipe.writer, PIPE_SIZE, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self._release()
            return False
        except OSError as error:
            self._release()
            self._broken(error)
            return False
        if count == 0:
            self._read_all = True
            self._reactor.removeReader(self)
            self._release()
            self._pass_on_end()
            return False
        pipe.filled = count
        return self._push()

    def _push(self) -> bool:
        """Write what is in the pipe; return whether all of it was taken."""
        pipe = self._pipe
        if pipe is None or self.peer._fd < 0:
            return False
        stuck = False
        while pipe.filled:
            try:
                count = os.splice(
                    pipe.reader, self.peer._fd, pipe.filled, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
                )
                pipe.filled -= count
                self._pool.moved += count
                self.passed += count
            except BlockingIOError:
                stuck = True
                break
            except OSError as error:
                self._broken(error)
                return False
        if stuck:
            self._reactor.removeReader(self)
            self._reactor.addWriter(self.peer)
            return False
        self._reactor.removeWriter(self.peer)
        self._release()
        self._reactor.addReader(self)
        return True

    def _release(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._pool.give_back(pipe)

    def _pass_on_end(self) -> None:
        """Shut down the peer for writing, as all bytes of this socket were passed on."""
        self.ended = True
        try:
            self.peer._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                self._broken(error)
                return
        if self.peer.ended:
            self._finish(None)

    def _broken(self, error: BaseException | None) -> None:
        self._finish(error or CONNECTION_LOST)

    def _finish(self, error: BaseException | None) -> None:
        if self._fd >= 0:
            self.stop()
            self.peer.stop()
            self._done(error)


def can_splice() -> bool:
    """Return whether the kernel moves bytes between sockets. All of Linux does; what emulates Linux may not."""
    one, other = socket.socketpair()
    pipe = Pipe()
    try:
        with one, other:
            other.send(b"x")
            into = os.splice(one.fileno(), pipe.writer, 1, flags=os.SPLICE_F_NONBLOCK)
            return into == os.splice(pipe.reader, one.fileno(), 1, flags=os.SPLICE_F_NONBLOCK) == 1
    except OSError:
        return False
    finally:
        pipe.close()


def splice(
    reactor: IReactorFDSet,
    pool: PipePool,
    one: socket.socket,
    other: socket.socket,
    done: Callable[[BaseException | None], None],
    ended: tuple[bool, bool] = (False, False),
) -> tuple[SplicedSocket, SplicedSocket]:
    """
    Move bytes between two sockets, both ways, half-close included, until both have ended.

    :param done: as :class:`SplicedSocket` has it.
    :param ended: of each, whether its end of file has come and was passed on; of one at most.
    """
    ends = SplicedSocket(reactor, pool, one, done), SplicedSocket(reactor, pool, other, done)
    ends[0].peer, ends[1].peer = ends[1], ends[0]
    for end, over in zip(ends, ended, strict=True):
        end.ended = over
    for end in ends:
        end.start()
    return ends
