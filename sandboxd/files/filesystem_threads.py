"""
Threads for file operations, a pool for each file system, so that one that hangs blocks its own callers only.

The pool for a path is found without touching any other file system: its links are followed in the pool of the file
system that they are on, step by step. Mounts and links can change before the pool is used; then the call runs in the
wrong pool, and has no other harm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorFromThreads

from sandboxd.files.errors import FileError
from sandboxd.files.mounts import Mounts, Resolution
from sandboxd.files.root import working_directory
from sandboxd.reactor.threads import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")

#: Threads for the operations of one file system.
POOL_THREADS = 16

#: Operations that may run or wait in one pool.
MAX_UNDER_WAY = 1024


class Busy(FileError):
    """Too many operations wait for one file system, which may hang."""

    def __init__(self, path: str) -> None:
        super().__init__("open", path, f"{MAX_UNDER_WAY} operations wait for its file system; try again later")

    @property
    def status(self) -> int:
        """The HTTP status for this error."""
        return 503


class FilesystemThreads:
    """
    A pool of threads for each file system. Call it with a path, a function that uses it, and the function's arguments.

    :param base: where relative paths begin; None for the working directory.
    :ivar mounts: the table of mounts.
    """

    def __init__(self, reactor: IReactorFromThreads, base: str | None = None) -> None:
        self._reactor = reactor
        self._base = base or ""
        self.mounts = Mounts()
        self._pools: dict[frozenset[bytes], ThreadPool] = {}

    def __call__(
        self, path: str | tuple[str, ...], function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Deferred[T]:
        """
        Call ``function`` in a thread of the path's file system; fires in the reactor's thread with its result.

        Cancelled before it has begun, it never does.

        :param path: the path that it uses, or all of them.
        """
        cancelled = False

        def call() -> T:
            if cancelled:
                raise CancelledError
            return function(*args, **kwargs)

        async def run() -> T:
            nonlocal cancelled
            try:
                return await (self._run(path, call) if isinstance(path, str) else self._run_all(path, call))
            except CancelledError:
                cancelled = True
                raise

        return Deferred.fromCoroutine(run())

    async def _run(self, path: str, call: Callable[[], T]) -> T:
        """
        Resolve a path in the pools of the file systems on its way, and call ``call`` in the last one; for most paths
        that is the first.
        """

        def step(resolution: Resolution) -> tuple[Resolution, list[T]]:
            resolution, arrived = self.mounts.advance(resolution)
            return resolution, [call()] if arrived else []

        resolution, result = self._begin(path), list[T]()
        while not result:
            resolution, result = await self._pool({resolution.device}, path)(step, resolution)
        return result[0]

    async def _run_all(self, paths: tuple[str, ...], call: Callable[[], T]) -> T:
        return await (await self._find_pool(paths))(call)

    def find_pool(self, path: str | tuple[str, ...]) -> Deferred[ThreadPool]:
        """
        Return the pool for a path, for callers with many calls to make, such as the parts of one file. Fires in the
        reactor's thread.

        :param path: the path that will be used, or all of them.
        """
        return Deferred.fromCoroutine(self._find_pool((path,) if isinstance(path, str) else path))

    async def _find_pool(self, paths: tuple[str, ...]) -> ThreadPool:
        devices = set()
        for path in paths:
            resolution, arrived = self._begin(path), False
            while not arrived:
                resolution, arrived = await self._pool({resolution.device}, path)(self.mounts.advance, resolution)
            devices.add(resolution.device)
        return self._pool(devices, paths[0])

    def _begin(self, path: str) -> Resolution:
        self.mounts.refresh()
        return self.mounts.begin(os.fsencode(os.path.join(working_directory(), self._base, path)))

    def _pool(self, devices: set[bytes], path: str) -> ThreadPool:
        """
        Return the pool of a file system, or of a set of them.

        :raise Busy: if it is full.
        """
        key = frozenset(devices)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = ThreadPool(self._reactor, POOL_THREADS, "files")
        if pool.under_way >= MAX_UNDER_WAY:
            raise Busy(path)
        return pool

    def start(self) -> None:
        """Start to watch the table of mounts."""
        self.mounts.open()

    def stop(self) -> None:
        """Let idle threads end. One that hangs in the kernel is left until the process exits."""
        self.mounts.close()
        for pool in self._pools.values():
            pool.stop()
