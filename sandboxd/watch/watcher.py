"""
The watcher of a directory, and of those below it, by inotify. It blocks: call it in a thread, one call at a time.

The rules that lose nothing: a new directory is watched first and read then, and what is found in it is
reported as created; events of the kernel for the same names are then left out. Directories are known by their watch,
not by their path, so that a move of one moves all below it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from sandboxd.watch import inotify
from sandboxd.watch.changes import Change
from sandboxd.watch.inotify import Inotify, RawEvent

#: Directories that one watch may have.
MAX_DIRECTORIES = 100_000

#: Changes after which a step ends, though there are more.
STEP = 4096

#: Seconds for which the second half of a move is waited for; the kernel delivers both in one read.
PATIENCE = 0.02

#: A directory that is not there any more, or not a directory any more: it was replaced or removed in between.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class WatchLimit(OSError):
    """No more directories can be watched: a limit of the kernel's."""


class _Node:
    """
    A watched directory.

    :ivar children: the directories in it, by name.
    :ivar announced: names in it that were reported as created, for which the kernel may deliver the same event.
    """

    __slots__ = ("announced", "children", "name", "parent", "wd")

    def __init__(self, parent: _Node | None, name: bytes) -> None:
        self.wd = -1
        self.parent = parent
        self.name = name
        self.children: dict[bytes, _Node] = {}
        self.announced: set[bytes] = set()

    def names(self) -> list[bytes]:
        """Return the path's components, from the top."""
        names = []
        node = self
        while node.parent is not None:
            names.append(node.name)
            node = node.parent
        return names[::-1]

    def path(self, name: bytes) -> bytes:
        """Return the path of an entry."""
        return b"/".join([*self.names(), name])


class _Move(NamedTuple):
    """The first half of a move, whose second half may follow."""

    path: bytes
    is_dir: bool
    node: _Node | None


class Watcher:
    """
    The watcher of one directory.

    :param open_top: opens it, ``O_PATH``. It is not kept open, see :meth:`~sandboxd.watch.inotify.Inotify.add`.
    :param recursive: whether to follow the directories below it too. Links are not followed.
    :param only: the one name in it to report changes of, or None for all.
    :param excluded: whether a path is to be left out.
    :ivar end: why there is nothing more to follow, or None.
    :ivar unreadable: directories that may not be read, and so are not followed.
    """

    def __init__(
        self,
        open_top: Callable[[], int],
        recursive: bool,
        only: bytes | None = None,
        excluded: Callable[[str], bool] | None = None,
    ) -> None:
        self.end: str | None = None
        self.unreadable = 0
        self._open_top = open_top
        self._recursive = recursive
        self._only = only
        self._excluded = excluded
        self._identity: tuple[int, int] | None = None
        self._inotify = Inotify()
        self._nodes: dict[int, _Node] = {}
        self._moves: dict[int, _Move] = {}
        self._top = _Node(None, b"")
        self._fresh: set[_Node] = set()
        self._changes: list[Change] = []

    def fileno(self) -> int:
        """Return the descriptor that is readable when :meth:`step` has work. It may change with each step."""
        return self._inotify.fileno()

    @property
    def directories(self) -> int:
        """The number of watched directories."""
        return len(self._nodes)

    def begin(self) -> None:
        """
        Watch the directory and, if ``recursive``, those below it.

        :raise WatchLimit: if there is too much.
        :raise OSError: if it is no directory, or may not be read.
        """
        top = self._open_top()
        try:
            self._identity = _identity(top)
            self._top.wd = self._inotify.add(top)
        except OSError as error:
            raise _limit(error) from None
        finally:
            os.close(top)
        self._nodes[self._top.wd] = self._top
        if self._recursive:
            self._follow([self._top], report=False)

    def close(self) -> None:
        """Close all watches."""
        self._inotify.close()
        self._nodes.clear()

    def step(self) -> tuple[list[Change], bool]:
        """
        Return the changes since the last step.

        :return: the changes, and whether there are more already.
        """
        self._changes = []
        while self.end is None and len(self._changes) < STEP:
            events = self._inotify.read(PATIENCE if self._moves else 0.0)
            if not events:
                self._settle()
                return self._changes, False
            for event in events:
                if event.mask & inotify.Q_OVERFLOW:
                    self._begin_anew()
                    break  # what came with it is of watches that are no more
                self._take(event)
                if self.end is not None:
                    break
        return self._changes, self.end is None

    def _settle(self) -> None:
        """Report moves without a second half as deletions, as the kernel's queue was read to its end."""
        for move in self._moves.values():
            self._moved_away(move)
        self._moves.clear()
        for node in self._fresh:
            node.announced.clear()
        self._fresh.clear()

    def _ignored(self, node: _Node, name: bytes) -> bool:
        return self._excluded is not None and self._excluded(os.fsdecode(node.path(name)))

    def _report(self, change: Change) -> None:
        if self._only is None or change.path in (b"", self._only):
            self._changes.append(change)

    def _take(self, event: RawEvent) -> None:
        node = self._nodes.get(event.wd)
        if node is None:
            return
        if event.mask & inotify.IGNORED:
            del self._nodes[event.wd]
            if node is self._top:
                self.end = "deleted"
        elif not event.name:
            if node is self._top:
                self._take_own(event.mask)
        elif not self._ignored(node, event.name):
            self._take_named(node, event)

    def _take_own(self, mask: int) -> None:
        """Handle an event of the top directory itself."""
        if mask & inotify.DELETE_SELF:
            self.end = "deleted"
        elif mask & inotify.MOVE_SELF:
            self.end = "moved"
        elif mask & inotify.UNMOUNT:
            self.end = "unmounted"
        elif mask & inotify.ATTRIB:
            self._report(Change("modified", b"", True))

    def _take_named(self, node: _Node, event: RawEvent) -> None:
        name, mask = event.name, event.mask
        path = node.path(name)
        is_dir = bool(mask & inotify.ISDIR)
        if mask & inotify.CREATE:
            if name in node.announced:
                node.announced.discard(name)
                return
            self._settle_at(path)
            self._report(Change("created", path, is_dir))
            self._arrived(node, name, is_dir)
        elif mask & inotify.MOVED_FROM:
            node.announced.discard(name)
            self._moves[event.cookie] = _Move(path, is_dir, node.children.pop(name, None))
        elif mask & inotify.MOVED_TO:
            self._moved_to(node, name, is_dir, self._moves.pop(event.cookie, None))
        elif mask & inotify.DELETE:
            node.announced.discard(name)
            node.children.pop(name, None)
            self._report(Change("deleted", path, is_dir))
        else:
            self._report(Change("modified", path, is_dir))

    def _moved_to(self, node: _Node, name: bytes, is_dir: bool, move: _Move | None) -> None:
        if name in node.announced:  # it was found there before, and reported as created
            node.announced.discard(name)
            if move is None:
                return
            if move.node is None or self._nodes.get(move.node.wd) is not move.node:
                self._moved_away(move)  # it was found there after the move
                return
            # What was found there is what the move has replaced.
        path = node.path(name)
        self._settle_at(path)
        if move is None or (self._only is not None and name == self._only):
            self._report(Change("created", path, is_dir))
        elif self._only is not None:
            self._report(Change("deleted", move.path, is_dir))
        else:
            self._report(Change("moved", path, is_dir, origin=move.path))
        if move is not None and move.node is not None:
            move.node.parent, move.node.name = node, name
            node.children[name] = move.node
        else:
            self._arrived(node, name, is_dir)

    def _settle_at(self, path: bytes) -> None:
        """Report what was moved away from a path, before something new is reported there."""
        for cookie, move in list(self._moves.items()):
            if move.path == path:
                del self._moves[cookie]
                self._moved_away(move)

    def _moved_away(self, move: _Move) -> None:
        """Report a move out of the watched directories as a deletion, and stop watching what was moved."""
        self._report(Change("deleted", move.path, move.is_dir))
        node = move.node
        if node is None or (node.parent is not None and node.parent.children.get(node.name) is node):
            return
        forgotten = [node]
        while forgotten:
            node = forgotten.pop()
            forgotten += node.children.values()
            if self._nodes.get(node.wd) is node:  # else it has been found again elsewhere
                self._inotify.remove(node.wd)
                del self._nodes[node.wd]

    def _arrived(self, parent: _Node, name: bytes, is_dir: bool) -> None:
        """Watch a new directory, and report its entries as created."""
        if not (is_dir and self._recursive):
            return
        try:
            fd = self._open(parent)
        except OSError as error:
            self._lost(parent, name, error)
            return
        if fd is None:
            return
        try:
            found = self._watch_and_report(fd, parent, name)
        finally:
            os.close(fd)
        if found is not None:
            self._follow([found], report=True)

    def _watch_and_report(self, parent_fd: int, parent: _Node, name: bytes) -> _Node | None:
        """Watch a directory like :meth:`_watch`, but report a limit that was reached to the readers."""
        try:
            return self._watch(parent_fd, parent, name)
        except OSError as error:  # a limit of watches or of descriptors
            self._lost(parent, name, error)
            return None

    def _lost(self, parent: _Node, name: bytes, error: OSError) -> None:
        """Report that changes below a directory are not reported from now on."""
        self._report(Change("overflow", parent.path(name), True, reason=error.strerror))

    def _begin_anew(self) -> None:
        """Watch everything again, and report an overflow, as the kernel has lost events."""
        self._inotify.close()
        self._inotify = Inotify()
        self._nodes.clear()
        self._moves.clear()
        self._fresh.clear()
        self._top = _Node(None, b"")
        try:
            self.begin()
        except WatchLimit as error:
            self._report(Change("overflow", b"", True, reason=error.strerror))
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self.end = "deleted"
            return
        self._report(Change("overflow", b"", True, reason="the kernel's queue of events was full"))

    def _follow(self, nodes: list[_Node], report: bool) -> None:
        """
        Read watched directories, and watch the directories in them.

        :param report: whether what is found is reported as created.
        """
        watch = self._watch_and_report if report else self._watch
        while nodes:
            node = nodes.pop()
            try:
                fd = self._open(node)
            except OSError as error:
                if not report or node.parent is None:
                    raise
                self._lost(node.parent, node.name, error)
                continue
            if fd is None:
                continue
            try:
                for name, is_dir in _entries(fd):
                    if self._ignored(node, name):
                        continue
                    if report:
                        node.announced.add(name)
                        self._report(Change("created", node.path(name), is_dir))
                    child = watch(fd, node, name) if is_dir else None
                    if child is not None:
                        nodes.append(child)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
            finally:
                os.close(fd)
            if report:
                self._fresh.add(node)

    def _watch(self, parent_fd: int, parent: _Node, name: bytes) -> _Node | None:
        """
        Watch a directory in one that is open.

        :return: its node, or None if the directory is gone.
        :raise WatchLimit: if there are too many.
        """
        try:
            fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise
        try:
            if len(self._nodes) >= MAX_DIRECTORIES:
                raise WatchLimit(errno.ENOSPC, f"more than {MAX_DIRECTORIES} directories; watch less")
            wd = self._inotify.add(fd)
        except PermissionError:
            self.unreadable += 1
            return None
        except OSError as error:
            raise _limit(error) from None
        finally:
            os.close(fd)
        node = self._nodes.get(wd)
        if node is None:
            node = self._nodes[wd] = _Node(parent, name)
            node.wd = wd
        elif node.parent is not None and (node.parent is not parent or node.name != name):
            # It was moved here, and the kernel's event of that is yet to be read.
            if node.parent.children.get(node.name) is node:
                del node.parent.children[node.name]
            node.parent, node.name = parent, name
        parent.children[name] = node
        return node

    def _open(self, node: _Node) -> int | None:
        """
        Open a watched directory by its path's components, so that no link leads elsewhere; return None if it is gone.
        """
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = self._open_top()
        except OSError as error:
            if error.errno not in (*_GONE, errno.EACCES, errno.EXDEV):  # EXDEV: it is outside of the root now
                raise
            return None
        if _identity(fd) != self._identity:
            os.close(fd)
            return None
        for name in [*node.names(), b"."]:
            try:
                inner = os.open(name, flags if name != b"." else os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            except OSError as error:
                if error.errno == errno.EACCES:
                    self.unreadable += 1
                elif error.errno not in _GONE:
                    raise
                return None
            finally:
                os.close(fd)
            fd = inner
        return fd


def _entries(fd: int) -> list[tuple[bytes, bool]]:
    """Return the names in a directory, and whether each is a directory."""
    with os.scandir(fd) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]


def _identity(fd: int) -> tuple[int, int]:
    info = os.fstat(fd)
    return info.st_dev, info.st_ino


def _limit(error: OSError) -> OSError:
    if error.errno == errno.ENOSPC:
        return WatchLimit(errno.ENOSPC, "the kernel's limit of watches, fs.inotify.max_user_watches, is reached")
    return error
