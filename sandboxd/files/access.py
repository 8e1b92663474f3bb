"""Access to files for the routes: the root that confines paths, and the threads of each file system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from twisted.internet.defer import Deferred

from sandboxd.files.cached import CachedReader
from sandboxd.files.filesystem_threads import FilesystemThreads
from sandboxd.files.root import Root

P = ParamSpec("P")
T = TypeVar("T")


class Files(NamedTuple):
    """
    The root and the threads that all file routes share.

    :ivar root: where paths lead.
    :ivar threads: runs what blocks in threads of the file system that a path is on.
    """

    root: Root
    threads: FilesystemThreads

    def cached_reader(self) -> CachedReader:
        """Return a reader of small files that need no thread, for their contents are in memory."""
        return CachedReader(self.root, self.threads.mounts)

    def decode(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Deferred[T]:
        """Call a function that takes long, but uses no file, in a thread of the root directory's file system."""
        return self.threads("/", function, *args, **kwargs)

    def call(
        self, function: Callable[Concatenate[Root, str, P], T], path: str, /, *args: P.args, **kwargs: P.kwargs
    ) -> Deferred[T]:
        """Call a function of the root, a path and more in a thread of the path's file system."""
        return self.threads(path, function, self.root, path, *args, **kwargs)
