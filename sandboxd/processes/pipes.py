"""A child's descriptors, as the reactor watches them: its output, its stdin, its exit."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Bytes asked of a pipe at a time: what a pipe holds by default.
READ_SIZE = 64 * 1024

#: What a pipe that was found full is made to hold, and what it is asked for from then on: fewer and larger reads.
LARGE_PIPE = 1024 * 1024
LARGE_READ = 256 * 1024


_to_close: dict[Reactor, list[int]] = {}


def close_later(reactor: Reactor, fd: int) -> None:
    """
    Close a descriptor that the reactor has watched, once it has dealt with the events that it already has.

    Closed at once, its number could go to a new descriptor while an event of the old one is still to be delivered:
    the new one would be taken for hung up.
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
    """The reading end of a child's stdout or stderr. It is served in turns with all others."""

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        fd: int,
        received: Callable[[bytes], None],
        closed: Callable[[], None],
    ) -> None:
        """
        Own ``fd``.

        :param received: called with what the pipe delivers.
        :param closed: called once it has no writer any more, or :meth:`close` was called.
        """
        self._reactor = reactor
        self._turns = turns
        self._fd = fd
        self._queued = False
        self._paused = True
        self._received = received
        self._closed = closed
        self._size = READ_SIZE
        os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def pause(self) -> None:
        """Watch it no more."""
        self._paused = True
        self._reactor.removeReader(self)

    def resume(self) -> None:
        """Watch it."""
        self._paused = False
        if not self._queued and self._fd >= 0:
            self._reactor.addReader(self)

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
        if not data:
            self.close()
            return
        if len(data) == READ_SIZE:
            self._enlarge()
        self._received(data)

    def _enlarge(self) -> None:
        """Its writer is faster than we are."""
        self._size = LARGE_READ
        # Refused when this user's pipes hold too much already; see pipe(7).
        with suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, LARGE_PIPE)

    def drain(self) -> None:
        """Deliver what is in the pipe now: at most what a pipe can hold, lest a fast writer keep us here."""
        left = fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ)
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
        """Close it, if it is open."""
        if self._fd >= 0:
            self._reactor.removeReader(self)
            close_later(self._reactor, self._fd)
            self._fd = -1
            self._closed()


@implementer(IReadDescriptor)
class ExitWatch:
    """A pidfd, which becomes readable when its process exits: no SIGCHLD, and no search among all children."""

    def __init__(self, reactor: Reactor, pidfd: int, exited: Callable[[], object]) -> None:
        """
        Own ``pidfd``, and watch its process.

        :param exited: called once, when it has exited.
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
        """A pidfd does not hang up."""


@implementer(IWriteDescriptor)
class InputPipe:
    """The writing end of a child's stdin."""

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
        """Fires when the pipe has taken all of it."""
        if self._fd < 0 or self._closing:
            return fail(BrokenPipeError(errno.EPIPE, "its stdin is closed"))
        taken: Deferred[None] = Deferred()
        self._pending.append((memoryview(data), taken))
        self._reactor.addWriter(self)
        return taken

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
        """Close once all is written."""
        self._closing = True
        if not self._pending:
            self.close()

    def close(self) -> None:
        """Close at once; what was not taken is lost, and whoever waits for it is told."""
        if self._fd < 0:
            return
        self._reactor.removeWriter(self)
        close_later(self._reactor, self._fd)
        self._fd = -1
        pending, self._pending = self._pending, deque()
        for _, taken in pending:
            if not taken.called:
                taken.errback(BrokenPipeError(errno.EPIPE, "nobody reads its stdin any more"))
