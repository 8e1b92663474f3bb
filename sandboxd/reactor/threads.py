"""Thread pools for calls that would block the reactor."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred, fail
from twisted.internet.interfaces import IReactorFromThreads
from twisted.python.failure import Failure

#: Seconds for which another thread may keep the interpreter lock (GIL) when the reactor's wants it back, as it does
#: after each system call that may block; see :func:`sys.setswitchinterval`. Python's own 5 ms are 50 ms for a turn with
#: ten such calls while a thread computes; and longer where all processors are busy, as the thread's time slice is over
#: before it gives the lock up.
SWITCH_INTERVAL = 0.0005

P = ParamSpec("P")
T = TypeVar("T")


class NoThread(OSError):
    """A pool has no thread, and none can be started; nothing was called."""


class ThreadPool:
    """
    A bounded pool of threads. Call an instance with a function and its arguments.

    Twisted's own pool has several queues and locks, whose cost exceeds that of reading a small file.

    :param size: how many calls run at a time; more are queued.
    :param name: prefix of the threads' names.
    :ivar under_way: number of calls that run or are queued, cancelled ones included.
    """

    def __init__(self, reactor: IReactorFromThreads, size: int, name: str) -> None:
        self.under_way = 0
        self._reactor = reactor
        self._size = size
        self._name = name
        self._threads = 0
        self._waiting: SimpleQueue[tuple[Deferred[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._finished: deque[tuple[Deferred[Any], Any]] = deque()

    def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """
        Call ``function`` in a thread; return a Deferred that fires with its result, in the reactor's thread.

        It fails with EAGAIN, and nothing was called, if the pool has no thread and none can be started.
        """
        if self.under_way >= self._threads and self._threads < self._size:
            try:
                self._start_thread()
            except OSError as error:
                if self._threads == 0:
                    return fail(error)
        self.under_way += 1
        result: Deferred[T] = Deferred()
        self._waiting.put((result, lambda: function(*args, **kwargs)))
        return result

    def start(self) -> None:
        """
        Start all threads now, so that calls do not depend on whether more can be started later.

        :raise OSError: EAGAIN, if one cannot be started.
        """
        while self._threads < self._size:
            self._start_thread()

    def _start_thread(self) -> None:
        # A daemon thread cannot keep the process from exiting when it hangs in the kernel.
        thread = Thread(target=self._work, name=f"{self._name}-{self._threads + 1}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # "can't start new thread": RLIMIT_NPROC, pids.max or memory
            raise NoThread(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        self._threads += 1

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            deferred, call = job
            try:
                result = call()
            except BaseException:
                result = Failure()
            self._finished.append((deferred, result))
            self._reactor.callFromThread(self._deliver)
            del job, deferred, call, result  # or an idle thread would keep them

    def _deliver(self) -> None:
        """Fire the Deferreds of finished calls, in the reactor's thread."""
        while self._finished:
            deferred, result = self._finished.popleft()
            self.under_way -= 1
            if isinstance(result, Failure):
                deferred.errback(result)
            else:
                deferred.callback(result)

    def stop(self) -> None:
        """End idle threads. One that hangs in the kernel is left until the process exits."""
        for _ in range(self._threads):
            self._waiting.put(None)
        self._threads = 0
