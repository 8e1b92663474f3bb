"""A child's descriptors as the reactor watches them: output and input pipes, and a pidfd for its exit."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Bytes of one read: the default capacity of a pipe.
READ_SIZE = 64 * 1024

#: Capacity that a pipe gets once it was found full, and bytes of one read from then on.
LARGE_PIPE = 1024 * 1024
LARGE_READ = 256 * 1024

#: Seconds between two reads of a pipe whose data is dropped: a process that writes without end costs next to nothing,
#: and one that writes up to LARGE_PIPE bytes in that time does not block.
DROP_INTERVAL = 1.0


_to_close: dict[Reactor, list[int]] = {}


def close_later(reactor: Reactor, fd: int) -> None:
    """
    Close a descriptor that the reactor has watched, in the next turn.

    Closed at once, its number could be given to a new descriptor while the reactor still has an event of the old one
    to deliver, and would deliver it to the new one.
    """
    fds = _to_close.setdefault(reactor, [])
    fds.append(fd)
    if len(fds) == 1:
        reactor.callLater(0, _close_all, reactor)


def _close_all(reactor: Reactor) -> None:
    for fd in _to_close.pop(reactor):
        os.close(fd)


@implementer(IReadDescriptor)
class OutputPipe:
    """The read end of a child's stdout or stderr, or its terminal, read within the reactor's :class:`.TurnBudget`."""

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        fd: int,
        received: Callable[[bytes], None],
        closed: Callable[[], None],
    ) -> None:
        """
        Take over ``fd``, paused.

        :param received: called with the bytes of each read.
        :param closed: called once: at the end of file, or by :meth:`close`.
        """
        self._reactor = reactor
        self._turns = turns
        self._fd = fd
        self._queued = False
        self._paused = True
        self._received = received
        self._closed = closed
        self._size = READ_SIZE
        self._dropping = False
        self._later: IDelayedCall | None = None
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def pause(self) -> None:
        """Stop reading."""
        self._paused = True
        self._reactor.removeReader(self)

    def resume(self) -> None:
        """Start reading."""
        self._paused = False
        self._later = None
        if not self._queued and self._fd >= 0:
            self._reactor.addReader(self)

    def drop(self) -> None:
        """Drop the output from now on, and read it once in :data:`DROP_INTERVAL` seconds only."""
        self._dropping = True

    def doRead(self) -> None:
        if not self._turns.take(self._take_turn):
            self._queued = True
            self._reactor.removeReader(self)

    def _take_turn(self) -> None:
        if self._queued:
            self._queued = False
            if self._paused or self._fd < 0:
                return
            self._reactor.addReader(self)
        try:
            data = os.read(self._fd, self._size)
        except BlockingIOError:
            return
        except OSError:  # EIO: nobody has the other end of the terminal open
            data = b""
        if not data:
            self.close()
            return
        if len(data) == READ_SIZE:
            self._enlarge()
        if self._dropping:
            self._size = LARGE_PIPE
            self.pause()
            self._later = self._reactor.callLater(DROP_INTERVAL, self.resume)
        else:
            self._received(data)

    def _enlarge(self) -> None:
        """Make the pipe and the reads larger, as its writer is faster than its reader."""
        self._size = LARGE_READ
        # Refused when this user's pipes hold too much already; see pipe(7).
        with suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, LARGE_PIPE)

    def drain(self) -> None:
        """Read what is in the pipe now, at most its capacity, as a fast writer must not keep the reactor here."""
        try:
            left = fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ)
        except OSError:  # a terminal
            left = READ_SIZE
        while left > 0 and self._fd >= 0:
            try:
                data = os.read(self._fd, READ_SIZE)
            except OSError:
                return
            if not data:
                self.close()
                return
            left -= len(data)
            self._received(data)

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor, unless it is closed."""
        if self._fd >= 0:
            self._reactor.removeReader(self)
            if self._later is not None:
                self._later.cancel()
                self._later = None
            close_later(self._reactor, self._fd)
            self._fd = -1
            self._closed()


@implementer(IReadDescriptor)
class ExitWatch:
    """The watch of a pidfd, which becomes readable when its process exits: no SIGCHLD, no waitpid(2) of every child."""

    def __init__(self, reactor: Reactor, pidfd: int, exited: Callable[[], object]) -> None:
        """
        Take over ``pidfd`` and watch its process.

        :param exited: called once, when the process has exited.
        """
        self._reactor = reactor
        self._exited = exited
        self._fd = pidfd
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        close_later(self._reactor, self._fd)
        self._fd = -1
        self._exited()

    def connectionLost(self, reason: Failure) -> None:
        """Do nothing: a pidfd does not hang up."""


@implementer(IWriteDescriptor)
class InputPipe:
    """The write end of a child's stdin, or its terminal."""

    def __init__(self, reactor: Reactor, fd: int) -> None:
        os.set_blocking(fd, False)
        self._reactor = reactor
        self._fd = fd
        self._pending: deque[tuple[memoryview, Deferred[None]]] = deque()
        self._closing = False

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def feed(self, data: bytes) -> Deferred[None]:
        """
        Write data; return a Deferred that fires when the pipe has taken all of it, or fails with
        :exc:`BrokenPipeError`.

        Cancelling it drops what the pipe has not taken.
        """
        if self._fd < 0 or self._closing:
            return fail(BrokenPipeError(errno.EPIPE, "its stdin is closed"))
        taken: Deferred[None] = Deferred(self._cancelled)
        self._pending.append((memoryview(data), taken))
        self._reactor.addWriter(self)
        return taken

    def _cancelled(self, cancelled: Deferred[None]) -> None:
        self._pending = deque((data, taken) for data, taken in self._pending if taken is not cancelled)
        if not self._pending and self._fd >= 0:
            self._reactor.removeWriter(self)
            if self._closing:
                self.close()

    def doWrite(self) -> None:
        while self._pending:
            data, taken = self._pending[0]
            try:
                data = data[os.write(self._fd, data) :] if data else data
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            if data:
                self._pending[0] = (data, taken)
            else:
                self._pending.popleft()
                if not taken.called:
                    taken.callback(None)
        self._reactor.removeWriter(self)
        if self._closing:
            self.close()

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def close_when_done(self) -> None:
        """Close once all has been written."""
        self._closing = True
        if not self._pending:
            self.close()

    def close(self) -> None:
        """Close at once, failing the Deferreds of what has not been written."""
        if self._fd < 0:
            return
        self._reactor.removeWriter(self)
        close_later(self._reactor, self._fd)
        self._fd = -1
        pending, self._pending = self._pending, deque()
        for _, taken in pending:
            if not taken.called:
                taken.errback(BrokenPipeError(errno.EPIPE, "nobody reads its stdin any more"))
