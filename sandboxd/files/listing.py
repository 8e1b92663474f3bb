"""
Descriptions and lists of files: stat, list and glob.

A listing has a stable order and is given in pages: the cursor of the next one is the path behind which it begins, so
that no entry is repeated or left out, whatever is created or removed elsewhere between two pages.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat as modes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from typing import NamedTuple

from sandboxd.files.errors import os_errors
from sandboxd.files.etag import entity_tag
from sandboxd.files.patterns import Excludes, Pattern, State
from sandboxd.files.root import Root
from sandboxd.files.walk import TreeEntry, walk

#: Seconds after which a page ends, however little is in it.
PATIENCE = 3.0

#: Paths of directories that may not be read that a page has, at most.
MAX_UNREADABLE = 20

#: The first and the last second that :class:`datetime` knows; a file's time may be beyond.
_SECONDS = -62_135_596_800, 253_402_300_799

TYPES = {
    modes.S_IFREG: "file",
    modes.S_IFDIR: "dir",
    modes.S_IFLNK: "link",
    modes.S_IFIFO: "fifo",
    modes.S_IFSOCK: "socket",
    modes.S_IFCHR: "char",
    modes.S_IFBLK: "block",
}


def file_time(nanoseconds: int) -> str:
    """Format a file's time as RFC 3339 in UTC, to the nanosecond."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    text = datetime.fromtimestamp(min(max(seconds, _SECONDS[0]), _SECONDS[1]), timezone.utc)
    return f"{text:%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z".rjust(30, "0")


class OwnerNames:
    """The names of users and groups, each looked up once."""

    def __init__(self) -> None:
        self.user = cache(lambda uid: _name(lambda: pwd.getpwuid(uid).pw_name))
        self.group = cache(lambda gid: _name(lambda: grp.getgrgid(gid).gr_name))


def _name(look_up: Callable[[], str]) -> str | None:
    try:
        return look_up()
    except KeyError:
        return None


def described(path: str, info: os.stat_result, target: str | None, names: OwnerNames) -> dict[str, object]:
    """Describe a file, for the API."""
    type = TYPES.get(modes.S_IFMT(info.st_mode), "other")
    found: dict[str, object] = {
        "path": path,
        "name": os.path.basename(path.rstrip("/")) or "/",
        "type": type,
        "size": info.st_size,
        "mode": f"{modes.S_IMODE(info.st_mode):04o}",
        "uid": info.st_uid,
        "gid": info.st_gid,
        "owner": names.user(info.st_uid),
        "group": names.group(info.st_gid),
        "mtime": file_time(info.st_mtime_ns),
        "ctime": file_time(info.st_ctime_ns),
        "atime": file_time(info.st_atime_ns),
        "inode": info.st_ino,
        "links": info.st_nlink,
    }
    if target is not None:
        found["target"] = target
    if type == "file":
        found["etag"] = entity_tag(info)
    return found


def stat(root: Root, path: str, follow: bool = False) -> dict[str, object]:
    """
    Describe a file.

    :param follow: whether to follow a link in the last place.
    :raise FileError: if there is no such file.
    """
    with os_errors("stat", path):
        fd = root.open(path, os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW)
        try:
            info = os.fstat(fd)
            target = os.readlink("", dir_fd=fd) if modes.S_ISLNK(info.st_mode) else None
        finally:
            os.close(fd)
    return described(path, info, target, OwnerNames())


def followed(root: Root, path: str) -> list[tuple[str, os.stat_result]]:
    """
    Return the names in a directory, sorted, each with the stat of what it leads to; its own if that is nothing, or not
    in the root.

    :raise FileError: if it cannot be read.
    """
    found = []
    with os_errors("open", path):
        fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in sorted(os.listdir(fd)):
                try:
                    info = os.lstat(name, dir_fd=fd)
                except FileNotFoundError:  # removed since
                    continue
                if modes.S_ISLNK(info.st_mode):
                    with suppress(OSError):
                        info = root.stat(os.path.join(path, name))
                found.append((name, info))
        finally:
            os.close(fd)
    return found


@dataclass(frozen=True)
class ListFilter:
    """
    The filter of a list: which entries of a tree it has.

    :ivar depth: how deep to go; 1 is what is in the directory itself. None for all.
    :ivar pattern: what a path from the top has to match; None for anything.
    :ivar by_name: whether the pattern is of names, wherever they are.
    :ivar hidden: whether names that begin with a dot are meant, and what is in such directories.
    :ivar types: which types; None for all.
    """

    depth: int | None = None
    pattern: Pattern | None = None
    by_name: bool = False
    hidden: bool = True
    types: tuple[str, ...] | None = None
    excluded: Excludes | None = None


class Page(NamedTuple):
    """
    A page of a list.

    :ivar next: the cursor of the next page; None if this is the last.
    :ivar unreadable: directories that may not be read.
    """

    entries: list[dict[str, object]]
    next: str | None
    unreadable: list[str]


def listing(
    root: Root,
    path: str,
    choice: ListFilter,
    limit: int,
    after: str = "",
    brief: bool = False,
    patience: float = PATIENCE,
) -> Page:
    """
    Return a page of the list of a directory's entries.

    :param limit: entries that it has at most.
    :param after: the cursor of the page before.
    :param brief: leave out what a look at each would cost: ``path`` and ``type`` only, the latter ``dir`` or ``file``.
    :param patience: seconds after which it ends.
    :raise FileError: if it cannot be read.
    """
    entries: list[dict[str, object]] = []
    unreadable: list[str] = []
    names = OwnerNames()
    deadline = time.monotonic() + patience
    seen = after

    def failed(where: str, error: OSError) -> None:
        if not where:
            raise error
        if len(unreadable) < MAX_UNREADABLE:
            unreadable.append(where)

    with os_errors("open", path):
        top = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for entry in walk(top, after, failed):
            if not entry.passed and time.monotonic() > deadline and seen != after:
                return Page(entries, seen, unreadable)
            chosen = _is_chosen(entry, choice)
            if entry.passed:
                continue
            found = _entry(entry, choice.types, names, brief) if chosen else None
            if found is not None:
                if len(entries) == limit:
                    return Page(entries, seen, unreadable)
                entries.append(found)
            if found is not None or len(entries) < limit:
                seen = entry.path
    return Page(entries, None, unreadable)


def _is_chosen(entry: TreeEntry, choice: ListFilter) -> bool:
    """
    Return whether the filter takes an entry, its type aside; set ``entry.enter`` to False if it takes nothing below it.
    """
    if (not choice.hidden and entry.name.startswith(".") and choice.pattern is None) or (
        choice.excluded is not None and choice.excluded(entry.path)
    ):
        entry.enter = False
        return False
    if choice.depth is not None and entry.depth >= choice.depth:
        entry.enter = False
    if choice.pattern is None:
        return True
    if choice.by_name:
        if not choice.hidden and entry.name.startswith("."):
            entry.enter = False
        return choice.pattern.matches_path(entry.name)
    above = entry.above.mark if entry.above is not None else choice.pattern.start
    assert isinstance(above, frozenset)
    state: State = choice.pattern.step(above, entry.name)
    entry.mark = state
    if not state:
        entry.enter = False
    return choice.pattern.matches(state)


def _entry(entry: TreeEntry, types: tuple[str, ...] | None, names: OwnerNames, brief: bool) -> dict[str, object] | None:
    if brief and types is None:
        return {"path": entry.path, "type": "dir" if entry.is_dir else "file"}
    try:
        info = entry.lstat()
        type = TYPES.get(modes.S_IFMT(info.st_mode), "other")
        if types is not None and type not in types:
            return None
        if brief:
            return {"path": entry.path, "type": "dir" if entry.is_dir else "file"}
        target = os.readlink(entry.name, dir_fd=entry.dir_fd) if type == "link" else None
    except OSError:
        return None  # it is gone, or another thing, already
    return described(entry.path, info, target, names)
