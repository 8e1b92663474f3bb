"""Small changes of files in place: append and touch."""

from __future__ import annotations

import errno
import os
import stat as modes
from datetime import datetime, timezone
from time import time_ns

from sandboxd.files.errors import told
from sandboxd.files.renames import make_parents
from sandboxd.files.root import Root


def append(root: Root, path: str, data: bytes, parents: bool = False) -> os.stat_result:
    """
    Add to the end of a file, with one write(2), so that what others append at the same time comes before or after it.

    :param parents: whether to make the directories above it.
    :return: what is known of the file then.
    :raise FileError: if it cannot be written, or not all of it.
    """
    with told("append", path):
        if parents:
            make_parents(root, path)
        fd = _open(root, path, os.O_WRONLY | os.O_APPEND)
        try:
            _regular(fd)
            written = os.write(fd, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written: no space left")
            return os.fstat(fd)
        finally:
            os.close(fd)


def touch(root: Root, path: str, mtime: datetime | None, parents: bool = False) -> os.stat_result:
    """
    Give a file the current time, or another, and make it if it is not there.

    :param mtime: the time of its last change.
    :param parents: whether to make the directories above it.
    :return: what is known of the file then.
    :raise FileError: if it cannot be.
    """
    with told("touch", path):
        if parents:
            make_parents(root, path)
        try:
            fd = root.open(path, os.O_PATH)
        except FileNotFoundError:
            fd = _open(root, path, os.O_WRONLY)
        try:
            time = time_ns() if mtime is None else _nanoseconds(mtime)
            os.utime(f"/proc/self/fd/{fd}", ns=(time, time))
            return os.fstat(fd)
        finally:
            os.close(fd)


def _open(root: Root, path: str, flags: int) -> int:
    """Open a file, or make one, mode 0644 whatever the umask is."""
    while True:
        try:
            # O_NONBLOCK, or opening a FIFO would wait for a reader that may never come.
            return root.open(path, flags | os.O_NONBLOCK)
        except FileNotFoundError:
            pass
        try:
            fd = root.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if modes.S_ISLNK(root.stat(path, follow=False).st_mode):
                return root.open(path, flags | os.O_CREAT | os.O_NONBLOCK, 0o644)  # a link to what is not there yet
            continue
        os.fchmod(fd, 0o644)
        return fd


def _regular(fd: int) -> None:
    info = os.fstat(fd)
    if not modes.S_ISREG(info.st_mode):
        raise OSError(errno.EEXIST, "not a regular file")


def _nanoseconds(time: datetime) -> int:
    since = time.astimezone(timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
