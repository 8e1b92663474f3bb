"""Removes trees. Every step goes through descriptors, so that no link that is swapped in on the way leads elsewhere."""

from __future__ import annotations

import os
import secrets
import stat as modes
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

#: Directories that are open at a time. What is deeper is moved up, so that a tree of any depth can be removed.
_MAX_OPEN = 64


class _Level(NamedTuple):
    """A directory that is being emptied."""

    fd: int
    name: bytes
    left: list[bytes]


def remove_tree(dir_fd: int, name: bytes) -> None:
    """
    Remove whatever has a name in a directory, as ``rm -rf`` does. Links are not followed. What others remove
    meanwhile is no error.

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
                fresh = f".sandboxd-{secrets.token_hex(8)}.tmp".encode("ascii")
                os.rename(entry, fresh, src_dir_fd=level.fd, dst_dir_fd=levels[0].fd)
                levels[0].left.append(fresh)
    finally:
        for level in levels:
            os.close(level.fd)


def _level(dir_fd: int, name: bytes) -> _Level:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        return _Level(fd, name, [os.fsencode(entry) for entry in os.listdir(fd)])
    except BaseException:
        os.close(fd)
        raise


def _gone(remove: Callable[..., None], name: bytes, dir_fd: int) -> None:
    with suppress(FileNotFoundError):
        remove(name, dir_fd=dir_fd)
