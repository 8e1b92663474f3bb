"""
Walks of directory trees in a stable order: entries by name, each directory before its own entries.

Every step goes through descriptors and follows no link, so that a directory that becomes a link meanwhile
leads nowhere else.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat as modes
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import NamedTuple

from sandboxd.files.temporary_names import temporary_name

#: Directories that are open at a time, however deep a tree is.
_MAX_OPEN = 64

#: Names of one directory that are held at a time.
_BATCH = 50_000

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: Errors when an entry was removed or replaced since it was listed.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class TreeEntry:
    """
    An entry of a tree.

    :ivar path: relative to the top, as :func:`os.fsdecode` makes it.
    :ivar name: its last component.
    :ivar dir_fd: the directory that it is in, open until the walk goes on.
    :ivar is_dir: whether it is a directory, no link to one.
    :ivar above: the directory that it is in, or None at the top.
    :ivar depth: 1 at the top.
    :ivar is_file: whether it was a regular file when its directory was read; False too if the file system did not say.
    :ivar passed: whether it is an ancestor of, or at, the ``after`` path: already reported.
    :ivar enter: whether to go into it; set it to False before the walk goes on to leave out what it has.
    :ivar mark: free for the caller's use.
    """

    __slots__ = ("above", "depth", "dir_fd", "enter", "is_dir", "is_file", "mark", "name", "passed", "path")

    def __init__(
        self, above: TreeEntry | None, dir_fd: int, name: str, is_dir: bool, is_file: bool, passed: bool
    ) -> None:
        self.above = above
        self.name = name
        self.path: str = name if above is None else f"{above.path}/{name}"
        self.dir_fd = dir_fd
        self.is_dir = self.enter = is_dir
        self.is_file = is_file
        self.depth: int = 1 if above is None else above.depth + 1
        self.passed = passed
        self.mark: object = None

    def lstat(self) -> os.stat_result:
        """
        Return its stat.

        :raise OSError: if it is gone.
        """
        return os.lstat(self.name, dir_fd=self.dir_fd)

    def open(self, flags: int) -> int:
        """
        Open it, unless it is a link.

        :raise OSError: if it cannot be opened.
        """
        return os.open(self.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.dir_fd)


class _Level:
    """
    A directory that the walk is in, with its entries that are still to come.

    :ivar fd: -1 while it is closed, for there are too many.
    """

    def __init__(self, entry: TreeEntry | None, fd: int, after: list[str]) -> None:
        self.entry = entry
        self.fd = fd
        self.last = ""
        self.after = after  # empty unless the walk is still on the way to where it begins
        self.left: Iterator[tuple[str, bool, bool]] = iter(())
        self.more = True

    def next(self) -> tuple[str, bool, bool, list[str] | None] | None:
        """
        Return the next name, whether it is a directory, whether it is a regular file, and the rest of the ``after``
        path if that leads through it.
        """
        while True:
            found = next(self.left, None)
            if found is None:
                if not self.more:
                    return None
                self._read()
                continue
            self.last, is_dir, is_file = found
            after, self.after = self.after, []
            return self.last, is_dir, is_file, after[1:] if after and self.last == after[0] else None

    def _read(self) -> None:
        first = self.after[0] if self.after else ""
        with os.scandir(self.fd) as entries:
            names = (
                (entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False))
                for entry in entries
                if entry.name > self.last and entry.name >= first
            )
            found = list(islice(names, _BATCH))
            rest = next(names, None)
            if rest is None:
                found.sort()
            else:
                found = heapq.nsmallest(_BATCH, chain(found, [rest], names))
            self.more = rest is not None
        self.left = iter(found)


def walk(top: int, after: str = "", failed: Callable[[str, OSError], None] | None = None) -> Iterator[TreeEntry]:
    """
    Yield all entries below a directory.

    :param top: the directory, open to be read. The walk closes it.
    :param after: begin behind this path. What is on the way there comes too, as ``passed``.
    :param failed: called with the path and the error of a directory that cannot be read, which is then left out;
        without it that error is raised. One that is gone is no error.
    """
    levels = [_Level(None, top, [part for part in after.split("/") if part])]
    try:
        while levels:
            level = levels[-1]
            if level.fd < 0:
                level.fd = _reopen(levels)
            try:
                found = level.next() if level.fd >= 0 else None
            except OSError as error:
                found = None
                _tell(failed, level.entry.path if level.entry else "", error)
            if found is None:
                if level.fd >= 0:
                    os.close(level.fd)
                levels.pop()
                continue
            name, is_dir, is_file, way = found
            entry = TreeEntry(level.entry, level.fd, name, is_dir, is_file, way is not None)
            yield entry
            if not entry.enter:
                continue
            try:
                fd = os.open(name, _FLAGS, dir_fd=level.fd)
            except OSError as error:
                if error.errno not in GONE:
                    _tell(failed, entry.path, error)
                continue
            levels.append(_Level(entry, fd, way or []))
            if len(levels) > _MAX_OPEN + 1:  # the first stays open
                oldest = levels[-_MAX_OPEN - 1]
                if oldest.fd >= 0:
                    os.close(oldest.fd)
                    oldest.fd = -1
    finally:
        for level in levels:
            if level.fd >= 0:
                os.close(level.fd)


def _tell(failed: Callable[[str, OSError], None] | None, path: str, error: OSError) -> None:
    if failed is None:
        raise error
    failed(path, error)


def _reopen(levels: list[_Level]) -> int:
    """
    Open the last of these directories by way of the others, the first of which is open; return -1 if it is gone.

    Those just above it are opened again too: the walk is on its way up, and needs them next.
    """
    fd = os.dup(levels[0].fd)
    for index, level in enumerate(levels[1:], 1):
        assert level.entry is not None
        try:
            inner = os.open(level.entry.name, _FLAGS, dir_fd=fd)
        except OSError:
            return -1
        finally:
            os.close(fd)
        fd = inner
        if len(levels) - _MAX_OPEN < index < len(levels) - 1 and level.fd < 0:
            level.fd = os.dup(fd)
    return fd


_PATH_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class DirectoryTree:
    """
    The directories of a tree, opened by their paths without following links.

    :param top: the directory, open. It is closed by :meth:`close`.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._open: list[tuple[str, int]] = []  # names from the top, each with its descriptor, or -1 if that is closed

    def directory(self, parts: Sequence[str], *, make: bool = False) -> int:
        """
        Return the descriptor of a directory, by its path's components. It stays open until the next call.

        The deepest ones on the way stay open as well, so that going through a tree opens each about once.

        :param make: whether to make what is missing, mode 0755.
        :raise OSError: if it is none, or a link.
        """
        common = 0
        for name, (known, _) in zip(parts, self._open, strict=False):
            if name != known:
                break
            common += 1
        self._close_below(common)
        if self._open and self._open[-1][1] < 0:
            self._close_below(0)
        for name in parts[len(self._open) :]:
            above = self._open[-1][1] if self._open else self._top
            try:
                fd = os.open(name, _PATH_FLAGS, dir_fd=above)
            except FileNotFoundError:
                if not make:
                    raise
                with suppress(FileExistsError):  # another request has made it
                    os.mkdir(name, 0o755, dir_fd=above)
                fd = os.open(name, _PATH_FLAGS, dir_fd=above)
            self._open.append((name, fd))
            if len(self._open) > _MAX_OPEN:
                oldest, fd = self._open[-_MAX_OPEN - 1]
                if fd >= 0:
                    os.close(fd)
                    self._open[-_MAX_OPEN - 1] = oldest, -1
        return self._open[-1][1] if self._open else self._top

    def _close_below(self, depth: int) -> None:
        for _, fd in self._open[depth:]:
            if fd >= 0:
                os.close(fd)
        del self._open[depth:]

    def settle(self, parts: Sequence[str], mode: int, mtime: int) -> None:
        """
        Set a directory's mode, and its time (ns), once all its entries are written, which changes its time.

        :raise OSError: if it cannot have them.
        """
        above = self.directory(parts[:-1])
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(parts[-1], flags, dir_fd=above)
        try:
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime, mtime))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close all descriptors. Can be called again."""
        if self._top >= 0:
            self._close_below(0)
            os.close(self._top)
            self._top = -1


class _RemovalLevel(NamedTuple):
    """A directory that is being emptied."""

    fd: int
    name: bytes
    left: list[bytes]


def remove_tree(dir_fd: int, name: bytes) -> None:
    """
    Remove a name from a directory, with all that is below it, as ``rm -rf`` does. Links are not followed. It is no
    error if others remove something first.

    :param dir_fd: the directory.
    :raise FileNotFoundError: if there is nothing.
    :raise OSError: if something cannot be removed; what is left is left.
    """
    if not modes.S_ISDIR(os.lstat(name, dir_fd=dir_fd).st_mode):
        os.unlink(name, dir_fd=dir_fd)
        return
    levels = [_level(dir_fd, name)]
    try:
        while levels:
            level = levels[-1]
            if not level.left:
                above = levels[-2].fd if len(levels) > 1 else dir_fd
                _gone(os.rmdir, level.name, above)
                os.close(levels.pop().fd)
                continue
            entry = level.left.pop()
            try:
                is_directory = modes.S_ISDIR(os.lstat(entry, dir_fd=level.fd).st_mode)
            except FileNotFoundError:
                continue
            if not is_directory:
                _gone(os.unlink, entry, level.fd)
            elif len(levels) < _MAX_OPEN:
                levels.append(_level(level.fd, entry))
            else:
                fresh = os.fsencode(temporary_name())
                os.rename(entry, fresh, src_dir_fd=level.fd, dst_dir_fd=levels[0].fd)
                levels[0].left.append(fresh)
    finally:
        for level in levels:
            os.close(level.fd)


def _level(dir_fd: int, name: bytes) -> _RemovalLevel:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return _RemovalLevel(fd, name, [os.fsencode(entry) for entry in os.listdir(fd)])
    except BaseException:
        os.close(fd)
        raise


def _gone(remove: Callable[..., None], name: bytes, dir_fd: int) -> None:
    with suppress(FileNotFoundError):
        remove(name, dir_fd=dir_fd)
