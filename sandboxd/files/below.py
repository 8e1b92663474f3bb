"""Directories below one that is open, each opened from the one above it: no link is followed."""

from __future__ import annotations

import os
from collections.abc import Sequence

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Below:
    """
    A directory and those below it.

    :param top: the directory, open. It is closed by :meth:`close`.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._at: tuple[list[str], int] = ([], os.dup(top))

    def directory(self, parts: Sequence[str], *, make: bool = False) -> int:
        """
        A directory, by the names on the way to it. It stays open until the next one is asked for.

        :param make: whether to make what is missing, mode 0755.
        :raise OSError: if it is none, or a link.
        """
        parts = list(parts)
        known, fd = self._at
        if parts == known:
            return fd
        if parts[: len(known)] == known:
            done, here = len(known), os.dup(fd)
        else:
            done, here = 0, os.dup(self._top)
        try:
            for name in parts[done:]:
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=here)
                except FileNotFoundError:
                    if not make:
                        raise
                    os.mkdir(name, 0o755, dir_fd=here)
                    inner = os.open(name, _DIRECTORY, dir_fd=here)
                os.close(here)
                here = inner
        except BaseException:
            os.close(here)
            raise
        os.close(fd)
        self._at = parts, here
        return here

    def settle(self, parts: Sequence[str], mode: int, mtime: int) -> None:
        """
        Give a directory, once all is in it, its mode, and its time (ns), which writing into it would have changed.

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
        """Close all that is open; once more is no harm."""
        if self._top >= 0:
            os.close(self._at[1])
            os.close(self._top)
            self._top = -1
