"""Route ``/watch``: the changes in a directory, as Server-Sent Events."""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Hashable
from typing import NamedTuple

from sandboxd.api.operations import Events
from sandboxd.api.routing import ApiError, Routes
from sandboxd.api.streaming import check_streams, resume_after
from sandboxd.files.access import Files
from sandboxd.files.errors import FileError, os_errors
from sandboxd.files.root import Root
from sandboxd.messages.watch import Changed, MissedChanges, Moved, Overflow, Ready, WatchEnded, WatchQuery
from sandboxd.watch.changes import Change, DroppedChanges
from sandboxd.watch.watcher import Watcher
from sandboxd.watch.watches import TooManyWatches, Watch, Watches
from sandboxd.web.request import Request
from sandboxd.web.sse import EventStream, Streams, event

#: Changes that are encoded at a time.
BATCH = 256


class _Target(NamedTuple):
    """
    The directory or file that a request asks to watch.

    :ivar key: equal for equal watches, which are shared.
    :ivar prefix: the directory as the client calls it.
    :ivar watcher: makes the watcher.
    """

    key: Hashable
    prefix: bytes
    watcher: Callable[[], Watcher]


def add_watch_routes(routes: Routes, files: Files, streams: Streams, watches: Watches) -> None:
    """
    Add ``GET /watch`` to the API.

    :param files: the files that requests reach.
    """

    @routes.get(
        "/watch",
        query=WatchQuery,
        reply=Events(
            ready=Ready,
            created=Changed,
            modified=Changed,
            deleted=Changed,
            moved=Moved,
            overflow=Overflow,
            gap=MissedChanges,
            end=WatchEnded,
        ),
        errors=(403, 404, 409, 503, 507),
        headers=("Last-Event-ID",),
    )
    async def watch(request: Request, query: WatchQuery) -> None:
        """
        Send the changes in a directory as Server-Sent Events.

        The first event, ``ready``, says that the watch has begun: each change from then on is an event. Every event has
        an ``id``; a client that sends the last one within a minute gets what it has missed, or a ``gap`` event if that
        is no longer kept. ``overflow`` says that the kernel has lost changes, ``end`` why there will be no more events.
        Many modifications of a file within a moment are one event. Links are not followed.
        """
        after = resume_after(request, query.after)
        check_streams(streams)
        target = await files.threads(query.path, _target, files.root, query)
        pool = await files.threads.find_pool(query.path)
        try:
            joined = await watches.join(target.key, pool, target.watcher)
        except TooManyWatches as error:
            raise ApiError(503, str(error)) from None
        except OSError as error:
            raise _refused(query.path, error) from None
        try:
            position = after + 1 if after else joined.log.next
            stream = streams.open(request)
            try:
                ready = {
                    "path": query.path,
                    "recursive": query.recursive,
                    "directories": joined.directories,
                    "unreadable": joined.unreadable,
                }
                stream.write(event("ready", ready, position - 1))
                if request.method != b"HEAD":
                    await _follow(stream, streams, joined, position, target.prefix)
            finally:
                stream.finish()
        finally:
            watches.leave(joined)


async def _follow(stream: EventStream, streams: Streams, watch: Watch, position: int, prefix: bytes) -> None:
    """Send the changes of a watch until it ends."""
    while True:
        await stream.when_ready()
        await streams.turns.turn()
        behind, found = watch.log.read(position, BATCH)
        if isinstance(found, DroppedChanges):
            stream.write(event("gap", {"dropped": found.number}, behind - 1))
        elif found:
            stream.write(b"".join(_event(change, number, prefix) for number, change in enumerate(found, position)))
        elif watch.log.end is not None:
            stream.write(event("end", {"reason": watch.log.end}, behind - 1))
            return
        else:
            await watch.log.when_more(position)
        position = behind


def _event(change: Change, number: int, prefix: bytes) -> bytes:
    def full(path: bytes) -> str:
        return os.fsdecode(os.path.join(prefix, path) if path else prefix)

    if change.kind == "overflow":
        return event("overflow", {"path": full(change.path), "reason": change.reason}, number)
    type = "dir" if change.is_dir else "file"
    if change.origin is not None:
        return event("moved", {"from": full(change.origin), "to": full(change.path), "type": type}, number)
    return event(change.kind, {"path": full(change.path), "type": type}, number)


def _target(root: Root, query: WatchQuery) -> _Target:
    """
    Return the target of a watch. A file is watched through its directory, so that it may be replaced.

    :raise FileError: if there is no such thing.
    :raise BadRequest: if a pattern is malformed.
    """
    excluded = query.excluded()
    only = None
    with os_errors("watch", query.path):
        real = root.real(query.path)
        info = root.stat(real, follow=False)
        prefix = os.fsencode(root.absolute(query.path))
        if not modes.S_ISDIR(info.st_mode):
            real, _, only = real.rpartition(b"/")
            real = real or b"/"
            prefix = real
            info = root.stat(real, follow=False)
    recursive = query.recursive and only is None

    def open_top() -> int:
        return root.open(real, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)

    key = (info.st_dev, info.st_ino, real, recursive, only, tuple(query.exclude))
    return _Target(key, prefix, lambda: Watcher(open_top, recursive, only, excluded if excluded else None))


def _refused(path: str, error: OSError) -> Exception:
    """Return the error of a watch that cannot be started."""
    if error.errno == errno.EMFILE:
        why = "too many open files, or watches in this system (fs.inotify.max_user_instances)"
        return ApiError(503, f"watch {path}: {why}")
    return FileError("watch", path, (error.strerror or str(error)).lower(), error.errno or 0)
