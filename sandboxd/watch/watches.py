"""The open watches: each runs in a thread, step by step, when its inotify descriptor is readable."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IDelayedCall, IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool
from sandboxd.watch.changes import Change, ChangeBatch, ChangeLog
from sandboxd.watch.watcher import Watcher

#: Seconds within which repeated changes of one path are merged.
BATCH_SECONDS = 0.05

#: Changes after which a batch ends before its time.
MAX_BATCH = 4096


class TooManyWatches(Exception):
    """No more watches can be open."""


@implementer(IReadDescriptor)
class Watch:
    """
    One watch. It stays open for a while after its last reader, so that one whose connection broke can go on.

    :param watcher: makes the watcher; called in a thread, as are the watcher's methods.
    :param first: number of its first change.
    :param ended: called once the watch is closed.
    :ivar log: the changes.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        threads: ThreadPool,
        watcher: Callable[[], Watcher],
        first: int,
        ended: Callable[[], None],
    ) -> None:
        self.log = ChangeLog(first)
        self.readers = 0
        self.idle: IDelayedCall | None = None
        self._reactor = reactor
        self._threads = threads
        self._ended = ended
        self._watcher: Watcher | None = None
        self._batch = ChangeBatch()
        self._over: IDelayedCall | None = None
        self._busy = True
        self._started: list[Deferred[None]] | None = []
        self._closed = False
        threads(_begun, watcher).addCallbacks(self._begun, self._not_begun)

    @property
    def directories(self) -> int:
        """The number of watched directories."""
        return 0 if self._watcher is None else self._watcher.directories

    @property
    def unreadable(self) -> int:
        """The number of directories that may not be read."""
        return 0 if self._watcher is None else self._watcher.unreadable

    async def when_started(self) -> None:
        """
        Wait until the watch has begun.

        :raise OSError: if it cannot.
        """
        if self._started is not None:
            waiting: Deferred[None] = Deferred()
            self._started.append(waiting)
            await waiting

    def _begun(self, watcher: Watcher) -> None:
        self._watcher = watcher
        started, self._started = self._started or [], None
        self._rest()
        for waiting in started:
            if not waiting.called:
                waiting.callback(None)

    def _not_begun(self, failure: Failure) -> None:
        started, self._started = self._started or [], None
        self._busy = False
        self.close("failed")
        for waiting in started:
            if not waiting.called:
                waiting.errback(Failure(failure.value))

    def fileno(self) -> int:
        """Return the descriptor that the reactor polls."""
        return -1 if self._watcher is None else self._watcher.fileno()

    def logPrefix(self) -> str:
        """Return the name in the reactor's own messages."""
        return "Watch"

    def doRead(self) -> None:
        """Run a step: the inotify descriptor is readable."""
        self._reactor.removeReader(self)
        self._step()

    def connectionLost(self, reason: Failure) -> None:
        """Close the watch: the reactor stops, or cannot poll it."""
        self.close("failed")

    def _step(self) -> None:
        assert self._watcher is not None
        self._busy = True
        self._threads(self._watcher.step).addCallbacks(self._stepped, self._failed)

    def _stepped(self, found: tuple[list[Change], bool]) -> None:
        assert self._watcher is not None
        changes, more = found
        for change in changes:
            self._batch.add(change)
        if len(self._batch) >= MAX_BATCH:
            self._flush()
        elif len(self._batch) and self._over is None:
            self._over = self._reactor.callLater(BATCH_SECONDS, self._flush)
        if more and not self._closed:
            self._step()
            return
        self._rest()
        if self._watcher.end is not None:
            self.close(self._watcher.end)

    def _failed(self, failure: Failure) -> None:
        self._log.failure("a watch has failed", failure)
        self._busy = False
        self.close("failed")

    def _rest(self) -> None:
        """Wait until the descriptor is readable; if the watch was closed meanwhile, release it."""
        self._busy = False
        if self._closed:
            self._release()
        else:
            self._reactor.addReader(self)

    def _flush(self) -> None:
        if self._over is not None and self._over.active():
            self._over.cancel()
        self._over = None
        if len(self._batch):
            self.log.append(self._batch.take())

    def close(self, reason: str) -> None:
        """Close the watch, and end the streams of its readers with a reason."""
        if self._closed:
            return
        self._closed = True
        self._flush()
        self.log.close(reason)
        if self.idle is not None and self.idle.active():
            self.idle.cancel()
        if not self._busy:
            self._reactor.removeReader(self)
            self._release()
        self._ended()

    def _release(self) -> None:
        if self._watcher is not None:
            # Not at once: an event of it that is still to be delivered would be taken for another descriptor's.
            self._reactor.callLater(0, self._watcher.close)


def _begun(make: Callable[[], Watcher]) -> Watcher:
    watcher = make()
    try:
        watcher.begin()
    except BaseException:
        watcher.close()
        raise
    return watcher


class Watches(Service):
    """
    The open watches, by what they watch.

    :param limit: how many may be open.
    :param linger: seconds for which a watch stays open without a reader.
    """

    def __init__(self, reactor: Reactor, limit: int, linger: float) -> None:
        self._reactor = reactor
        self._limit = limit
        self._linger = linger
        self._open: dict[Hashable, Watch] = {}
        self._first = 0

    def __len__(self) -> int:
        return len(self._open)

    async def join(self, key: Hashable, threads: ThreadPool, watcher: Callable[[], Watcher]) -> Watch:
        """
        Return the watch of something, begun if there is none; call :meth:`leave` when done.

        :param key: equal for equal watches.
        :param threads: the threads that the watcher is called in.
        :param watcher: makes the watcher; called in a thread.
        :raise TooManyWatches: if no more can be open.
        :raise OSError: if it cannot be watched.
        """
        watch = self._open.get(key)
        if watch is None:
            self._make_room()
            self._first = max(self._first + 1, time.time_ns() // 1000)
            watch = self._open[key] = Watch(self._reactor, threads, watcher, self._first, lambda: self._forget(key))
        watch.readers += 1
        if watch.idle is not None and watch.idle.active():
            watch.idle.cancel()
        try:
            await watch.when_started()
        except CancelledError:
            self.leave(watch)
            raise
        return watch

    def leave(self, watch: Watch) -> None:
        """Remove a reader of a watch."""
        watch.readers -= 1
        if not watch.readers and watch.log.end is None:
            watch.idle = self._reactor.callLater(self._linger, watch.close, "idle")

    def stopService(self) -> None:
        """Close all watches."""
        super().stopService()
        for watch in list(self._open.values()):
            watch.close("stopped")

    def _make_room(self) -> None:
        """Close the watch that has been without a reader for longest, if there are too many."""
        if len(self._open) < self._limit:
            return
        idle = [watch for watch in self._open.values() if not watch.readers and watch.idle is not None]
        if not idle:
            raise TooManyWatches(f"{len(self._open)} watches are open, which is the limit; try again later")
        min(idle, key=lambda watch: watch.idle.getTime() if watch.idle else 0).close("idle")

    def _forget(self, key: Hashable) -> None:
        self._open.pop(key, None)
