"""
inotify(7), by ctypes: watches of directories and their events.

Twisted's own wrapper does not serve: it drops the kernel's word that events were lost, gives up the whole
descriptor once any directory below is removed, does not pass on cookies, and walks trees on the reactor's thread.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
from typing import NamedTuple

MODIFY = 0x2
ATTRIB = 0x4
CLOSE_WRITE = 0x8
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATE = 0x100
DELETE = 0x200
DELETE_SELF = 0x400
MOVE_SELF = 0x800
UNMOUNT = 0x2000
Q_OVERFLOW = 0x4000
IGNORED = 0x8000
ISDIR = 0x40000000

_ONLYDIR = 0x01000000
#: IN_EXCL_UNLINK: ignore unlinked files that are still open.
_EXCL_UNLINK = 0x04000000

_MASK = (
    MODIFY
    | ATTRIB
    | CLOSE_WRITE
    | MOVED_FROM
    | MOVED_TO
    | CREATE
    | DELETE
    | DELETE_SELF
    | MOVE_SELF
    | _ONLYDIR
    | _EXCL_UNLINK
)

#: Bytes that are read at a time.
_CHUNK = 64 * 1024

_HEADER = struct.Struct("=iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class RawEvent(NamedTuple):
    """An event of inotify(7)."""

    wd: int
    mask: int
    cookie: int
    name: bytes


class Inotify:
    """
    An inotify descriptor.

    :raise OSError: if there are too many (EMFILE: ``fs.inotify.max_user_instances``).
    """

    def __init__(self) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """Return the descriptor, which is readable when there are events."""
        return self._fd

    def add(self, directory: int) -> int:
        """
        Watch a directory.

        :param directory: a descriptor of it, ``O_PATH`` suffices; it is not needed any more afterwards, and must not
            be kept: the kernel reports the removal of a directory only after its last descriptor is closed.
        :return: the watch descriptor, which its events have; the same again for a directory that is watched already.
        :raise OSError: if it cannot be watched (ENOSPC: ``fs.inotify.max_user_watches``).
        """
        return _checked(_libc.inotify_add_watch(self._fd, b"/proc/self/fd/%d" % directory, _MASK))

    def remove(self, wd: int) -> None:
        """Remove a watch; it is no error if there is none."""
        _libc.inotify_rm_watch(self._fd, wd)

    def read(self, patience: float = 0.0) -> list[RawEvent]:
        """
        Read the next events; an empty list if there are none.

        :param patience: seconds to wait for one.
        """
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            if not patience:
                return []
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return self.read() if poll.poll(patience * 1000) else []
        found = []
        position = 0
        while position < len(data):
            wd, mask, cookie, length = _HEADER.unpack_from(data, position)
            position += _HEADER.size
            found.append(RawEvent(wd, mask, cookie, data[position : position + length].rstrip(b"\0")))
            position += length
        return found

    def close(self) -> None:
        """Close the descriptor, and with it all watches."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
