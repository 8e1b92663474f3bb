"""Threads for file operations, so that a file system that hangs blocks its own callers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorFromThreads

from sandboxd.workers import Workers

P = ParamSpec("P")
T = TypeVar("T")

#: Threads for file operations; a file system that hangs can hold that many of its own callers.
FILE_THREADS = 16


class Lanes:
    """
    Bounded pools of threads. Call it with a path, a function that uses it, and the function's arguments.
    """

    def __init__(self, reactor: IReactorFromThreads) -> None:
        self._workers = Workers(reactor, FILE_THREADS, "files")

    def __call__(
        self, path: str | tuple[str, ...], function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Deferred[T]:
        """
        Call ``function`` in a thread; fires in the reactor's thread with its result.

        :param path: the path that it uses, or all of them.
        """
        return self._workers(function, *args, **kwargs)

    def find(self, path: str | tuple[str, ...]) -> Deferred[Workers]:
        """
        The threads for a path; fires in the reactor's thread. For whoever has many calls to make, such as the parts
        of one file.

        :param path: the path that will be used, or all of them.
        """
        return self._workers(lambda: self._workers)

    def start(self) -> None:
        """Begin to work."""
        self._workers.start()

    def stop(self) -> None:
        """Let idle threads end. One that hangs in the kernel is left to the process's exit."""
        self._workers.stop()
