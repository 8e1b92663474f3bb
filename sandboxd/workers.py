"""Threads for what would block the reactor."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread
from typing import Any, ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


class _DaemonThread(Thread):
    """A thread that cannot keep the process from exiting when it hangs in the kernel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, daemon=True)


class _Pool(ThreadPool):
    threadFactory = _DaemonThread


class Workers:
    """
    A bounded pool of threads. Call it with a function and its arguments.

    :param size: how many functions run at a time; more of them wait.
    :param name: what the threads are called.
    """

    def __init__(self, reactor: IReactorFromThreads, size: int, name: str) -> None:
        self._reactor = reactor
        self._pool = _Pool(0, size, name)
        self._under_way = 0
        self._lock = Lock()

    @property
    def under_way(self) -> int:
        """How many calls run or wait to, whether or not somebody waits for their results."""
        return self._under_way

    def __call__(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Call ``function`` in a thread; fires in the reactor's thread with its result."""
        self._count(1)

        def work() -> T:
            try:
                return function(*args, **kwargs)
            finally:
                self._count(-1)

        return deferToThreadPool(self._reactor, self._pool, work)

    def _count(self, more: int) -> None:
        with self._lock:
            self._under_way += more

    def start(self) -> None:
        """Begin to work."""
        self._pool.start()

    def stop(self) -> None:
        """Let idle threads end. One that hangs in the kernel is left to the process's exit."""
        if not self._pool.working:
            self._pool.stop()
