"""Which file system a path is on, as the kernel's table of mounts has it."""

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
    The devices of all mounts, by where they are mounted; see proc_pid_mountinfo(5).

    Two mounts of one file system have the same device, as ``major:minor``. Of two mounted at the same path the later counts.
    """
    found = {}
    for line in text.splitlines():
        fields = line.split(b" ", 5)
        if len(fields) == 6:
            found[_ESCAPE.sub(lambda code: bytes([int(code[1], 8)]), fields[4])] = fields[2]
    return found


def parse_types(text: bytes) -> dict[bytes, bytes]:
    """The types of all mounted file systems, by their devices as ``major:minor``; see proc_pid_mountinfo(5)."""
    found = {}
    for line in text.splitlines():
        fields, separator, rest = line.partition(b" - ")
        if separator:
            found[fields.split(b" ", 3)[2]] = rest.split(b" ", 1)[0]
    return found


class Resolution(NamedTuple):
    """
    A path on the way from its text to what it leads to.

    :ivar device: the file system of ``real``.
    :ivar real: how far it is known, without links.
    :ivar rest: what follows, the last component first.
    :ivar links: how many links were followed.
    """

    device: bytes
    real: bytes
    rest: tuple[bytes, ...]
    links: int = 0


class Mounts:
    """The table of mounts, read again when the kernel says that it has changed. Nothing of it touches the mounts."""

    def __init__(self) -> None:
        self._table: dict[bytes, bytes] = {}
        self._types: dict[bytes, bytes] = {}
        self._changes = select.poll()
        self._file: BinaryIO | None = None

    def open(self) -> None:
        """Begin to look. Without ``/proc`` everything is taken for one file system."""
        with suppress(OSError):
            self._file = open("/proc/self/mountinfo", "rb")  # noqa: SIM115
            self._changes.register(self._file, select.POLLPRI)
            self._read(self._file)

    def close(self) -> None:
        """Look no more."""
        if self._file is not None:
            self._changes.unregister(self._file)
            self._file.close()
            self._file = None

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        text = file.read()
        self._table, self._types = parse(text), parse_types(text)

    def refresh(self) -> None:
        """Look for changes."""
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
        Go on, link by link, as long as the way stays on one file system. Blocks if that hangs, and on no other.

        :return: how far it goes, and whether that is all.
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
                    # Where something is mounted is no link, and asking it is for its own thread.
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
        Where the way of a path begins: at the mount that its text names.

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
        """The file system of a path without links."""
        while real not in self._table and real != b"/":
            real = real.rpartition(b"/")[0] or b"/"
        return self._table.get(real, b"")
