"""Renames and links by directory descriptors, and the locks of names."""

from __future__ import annotations

import ctypes
import errno
import os
import stat as modes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from sandboxd.files.errors import os_errors
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import temporary_name

_RENAME_NOREPLACE = 1

#: A file system that cannot rename without replacing, renameat2(2).
_UNABLE = (errno.EINVAL, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)


def rename(source: int, name: str | bytes, target: int, new_name: str | bytes, *, overwrite: bool) -> None:
    """
    Rename a file or a directory atomically.

    :param source: the directory that it is in.
    :param target: the directory that it is to be in.
    :param overwrite: whether what has that name may be replaced: a file, a link, or an empty directory.
    :raise FileExistsError: if there is something, and it may not be.
    :raise OSError: if it cannot be; ``EXDEV`` if the other directory is on another file system.
    """
    if overwrite:
        with name_lock(target, os.fsencode(new_name)):
            if _are_links_to_one_file(source, name, target, new_name):
                os.unlink(name, dir_fd=source)  # rename(2) would do nothing, and report success
            else:
                os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)
        return
    if _libc.renameat2(source, os.fsencode(name), target, os.fsencode(new_name), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number not in _UNABLE:
        raise OSError(number, os.strerror(number))
    # EINVAL is also the error for a directory that would be moved into itself; rename(2) below fails with it too.
    with suppress(FileNotFoundError):
        os.lstat(new_name, dir_fd=target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(name, new_name, src_dir_fd=source, dst_dir_fd=target)


def _are_links_to_one_file(source: int, name: str | bytes, target: int, new_name: str | bytes) -> bool:
    """Return whether two different names are hard links to the same file."""
    try:
        one, other = os.lstat(name, dir_fd=source), os.lstat(new_name, dir_fd=target)
    except FileNotFoundError:
        return False
    same_name = os.fsencode(name) == os.fsencode(new_name) and os.path.samestat(os.fstat(source), os.fstat(target))
    return os.path.samestat(one, other) and not same_name and not modes.S_ISDIR(one.st_mode)


def make_parents(root: Root, path: str) -> None:
    """
    Make the directories above a path.

    :raise OSError: if one cannot be made.
    """
    root.make_directories(os.path.dirname(path.rstrip("/")) or ".")


def link(root: Root, path: str, target: str, *, hard: bool, overwrite: bool = False, parents: bool = False) -> None:
    """
    Make a link.

    :param path: where.
    :param target: the text of a symbolic link, or the path of the file for a hard link.
    :param overwrite: whether what is there may be replaced, if it is no directory.
    :param parents: whether to make the directories above it.
    :raise FileError: if it cannot be made.
    """
    with os_errors("link", path):
        if parents:
            make_parents(root, path)
        with root.parent(path) as (directory, name):
            if not hard:
                _put(directory, name, overwrite, lambda new: os.symlink(os.fsencode(target), new, dir_fd=directory))
                return
            with root.parent(target) as (source, source_name):
                _put(
                    directory,
                    name,
                    overwrite,
                    lambda new: os.link(
                        source_name, new, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False
                    ),
                )


def _put(directory: int, name: bytes, overwrite: bool, make: Callable[[bytes], None]) -> None:
    """Call ``make`` with a name, or with a temporary name that then replaces what is there."""
    if not overwrite:
        make(name)
        return
    temporary = os.fsencode(temporary_name())
    make(temporary)
    try:
        with name_lock(directory, name):
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        with suppress(OSError):  # it is still there if both are the same file, see rename(2)
            os.unlink(temporary, dir_fd=directory)


@contextmanager
def target_lock(root: Root, path: str) -> Iterator[None]:
    """
    Hold the :func:`name_lock` of the file that a path leads to, links followed: it need not exist.

    :raise OSError: if the directory that it is in cannot be opened.
    """
    with root.parent(root.real(path)) as (directory, name), name_lock(directory, name):
        yield


_guard = Lock()


_swapping: dict[tuple[int, int, bytes], tuple[Lock, int]] = {}


@contextmanager
def name_lock(dir_fd: int, name: bytes) -> Iterator[None]:
    """
    Hold a lock that keeps this daemon's other threads from replacing a name in a directory. Commands are not kept from
    it.

    :param dir_fd: the directory.
    """
    info = os.fstat(dir_fd)
    key = info.st_dev, info.st_ino, name
    with _guard:
        lock, users = _swapping.get(key, (Lock(), 0))
        _swapping[key] = lock, users + 1
    try:
        with lock:
            yield
    finally:
        with _guard:
            lock, users = _swapping[key]
            if users > 1:
                _swapping[key] = lock, users - 1
            else:
                del _swapping[key]
