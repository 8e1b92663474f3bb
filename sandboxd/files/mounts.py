"""The table of mounts: which file system a path is on."""

from __future__ import annotations

import errno
import os
import re
import select
from contextlib import suppress
from typing import BinaryIO, NamedTuple

#: Links on the way of one path, as many as the kernel follows.
MAX_LINKS = 40

_ESCAPE = re.compile(rb"\\([0-7]{3})")


def parse(text: bytes) -> dict[bytes, bytes]:
    """
    Return the devices of all mounts by mount point, from proc_pid_mountinfo(5).

    Two mounts of one file system have the same device, as ``major:minor``. The later of two at one path counts.
    """
    found = {}
    for line in text.splitlines():
        fields = line.split(b" ", 5)
        if len(fields) == 6:
            found[_ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), fields[4])] = fields[2]
    return found


def parse_types(text: bytes) -> dict[bytes, bytes]:
    """Return the types of all mounted file systems by device (``major:minor``), from proc_pid_mountinfo(5)."""
    found = {}
    for line in text.splitlines():
        fields, separator, rest = line.partition(b" - ")
        if separator:
            found[fields.split(b" ", 3)[2]] = rest.split(b" ", 1)[0]
    return found


class Resolution(NamedTuple):
    """
    The state of a path's resolution (path_resolution(7)), which goes on link by link.

    :ivar device: the file system of ``real``, as ``major:minor``.
    :ivar real: the part of the path that is resolved, without links.
    :ivar rest: the components that are left, the last one first.
    :ivar links: how many links were followed.
    """

    device: bytes
    real: bytes
    rest: tuple[bytes, ...]
    links: int = 0


class Mounts:
    """
    The table of mounts, read again when the kernel reports a change. Reading it never touches the mounts themselves.
    """

    def __init__(self) -> None:
        self._table: dict[bytes, bytes] = {}
        self._types: dict[bytes, bytes] = {}
        self._changes = select.poll()
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Read the table. Without ``/proc`` all paths count as being on one file system."""
        with suppress(OSError):
            self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115
            self._changes.register(self._file, select.POLLPRI)
            self._read(self._file)

    def close(self) -> None:
        """Close the table."""
        if self._file is not None:
            self._changes.unregister(self._file)
            self._file.close()
            self._file = None

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        text = file.read()
        self._table, self._types = parse(text), parse_types(text)

    def refresh(self) -> None:
        """Read the table again if it has changed."""
        if self._file is not None and self._changes.poll(0):
            self._read(self._file)

    def type_of(self, device: bytes) -> bytes | None:
        """
        Return the type of a file system that is mounted now, such as ``ext4``, or None.

        :param device: ``major:minor``.
        """
        self.refresh()
        return self._types.get(device)

    def advance(self, resolution: Resolution) -> tuple[Resolution, bool]:
        """
        Resolve more of a path, link by link, until it leaves its file system. Blocks if that file system hangs, and
        touches no other.

        :return: the new state, and whether the path is resolved.
        """
        device, real, links = resolution.device, resolution.real, resolution.links
        left = list(resolution.rest)
        while left and links <= MAX_LINKS:
            part = left.pop()
            if part == b"..":
                real = real.rpartition(b"/")[0] or b"/"
            else:
                ahead = os.path.join(real, part)
                try:
                    # A mount point is no link; a call on it is for the threads of its own file system.
                    target = None if ahead in self._table else os.readlink(ahead)
                except OSError as error:
                    target = None
                    if error.errno != errno.EINVAL:  # there is nothing, or we may not know
                        return Resolution(device, real, (), links), True
                if target is None:
                    real = ahead
                else:
                    links += 1
                    left += [part for part in reversed(target.split(b"/")) if part not in (b"", b".")]
                    real = b"/" if target.startswith(b"/") else real
            if self.device(real) != device:
                return Resolution(self.device(real), real, tuple(left), links), False
        return Resolution(device, real, (), links), True

    def begin(self, path: bytes) -> Resolution:
        """
        Return the beginning of a path's resolution: the mount point that its text names.

        :param path: an absolute path.
        """
        parts = [part for part in path.split(b"/") if part not in (b"", b".")]
        plain = parts.index(b"..") if b".." in parts else len(parts)
        for count in range(plain, 0, -1):
            real = b"/" + b"/".join(parts[:count])
            if real in self._table:
                return Resolution(self._table[real], real, tuple(reversed(parts[count:])))
        return Resolution(self.device(b"/"), b"/", tuple(reversed(parts)))

    def device(self, real: bytes) -> bytes:
        """Return the file system of a path without links."""
        while real not in self._table and real != b"/":
            real = real.rpartition(b"/")[0] or b"/"
        return self._table.get(real, b"")
