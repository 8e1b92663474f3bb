"""Threads for what would block the reactor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.python.failure import Failure

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPool:
    """
    A bounded pool of threads. Call it with a function and its arguments.

    Twisted's own pool does the same with several queues and locks, which for a small file cost more than the file.

    :param size: how many functions run at a time; more of them wait.
    :param name: what the threads are called.
    :ivar under_way: how many calls run or wait to, whether or not somebody waits for their results.
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
        """Call ``function`` in a thread; fires in the reactor's thread with its result."""
        self.under_way += 1
        if self.under_way > self._threads and self._threads < self._size:
            self._threads += 1
            # A daemon thread cannot keep the process from exiting when it hangs in the kernel.
            Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        result: Deferred[T] = Deferred()
        self._waiting.put((result, lambda: function(*args, **kwargs)))
        return result

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
        """Tell the results, in the reactor's thread."""
        while self._finished:
            deferred, result = self._finished.popleft()
            self.under_way -= 1
            if isinstance(result, Failure):
                deferred.errback(result)
            else:
                deferred.callback(result)

    def stop(self) -> None:
        """Let idle threads end. One that hangs in the kernel is left to the process's exit."""
        for _ in range(self._threads):
            self._waiting.put(None)
        self._threads = 0
