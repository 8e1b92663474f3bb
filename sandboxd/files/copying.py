"""Copies and moves of files and trees, also between file systems. A copy gets its name once it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import stat as modes
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple

from sandboxd.files.errors import os_errors
from sandboxd.files.renames import make_parents, rename
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import lock_temporary, temporary_name
from sandboxd.files.walk import DirectoryTree, remove_tree, walk

#: ioctl_ficlonerange(2).
_FICLONE = 0x40049409

#: Bytes that are copied at a time.
_PIECE = 16 * 1024 * 1024

#: Errors of file systems, or pairs of them, that do not support a call: fall back to another.
_UNABLE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.EPERM)

#: Most bytes that are copied of a file whose size is 0 by stat(2).
MAX_UNSIZED = 64 * 1024 * 1024

#: Most names of skipped files that a result lists.
MAX_SKIPPED = 100

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Copied(NamedTuple):
    """
    The result of a copy.

    :ivar entries: files, directories and links.
    :ivar size: bytes of the files.
    :ivar skipped: sockets and devices, which cannot be: the first :data:`MAX_SKIPPED` of them.
    """

    entries: int
    size: int
    skipped: list[str]


def copy(root: Root, source: str, target: str, *, overwrite: bool = False, parents: bool = False) -> Copied:
    """
    Copy a file, a link, or a directory tree. Links are copied as links. Modes and times are kept, and owners if this
    process is root, as ``cp -a`` does.

    :param target: its new name.
    :param overwrite: whether what is there may be replaced: a file, a link, or an empty directory.
    :param parents: whether to make the directories above it.
    :raise FileError: if it cannot be; then nothing is there that was not.
    """
    with os_errors("copy", source), root.parent(source) as (source_fd, source_name):
        os.lstat(source_name, dir_fd=source_fd)
        with os_errors("copy to", target):
            if parents:
                make_parents(root, target)
            with root.parent(target) as (target_fd, target_name):
                return _copy(root, source, source_fd, source_name, target, target_fd, target_name, overwrite)


def move(root: Root, source: str, target: str, *, overwrite: bool = False, parents: bool = False) -> Copied | None:
    """
    Rename a file or a directory tree; across file systems, copy it and then remove the original.

    :param target: its new name.
    :param overwrite: whether what is there may be replaced: a file, a link, or an empty directory.
    :param parents: whether to make the directories above it.
    :return: what was copied, if that was needed.
    :raise FileError: if it cannot be.
    """
    with os_errors("move", source), root.parent(source) as (source_fd, source_name):
        os.lstat(source_name, dir_fd=source_fd)
        with os_errors("move to", target):
            if parents:
                make_parents(root, target)
            with root.parent(target) as (target_fd, target_name):
                try:
                    rename(source_fd, source_name, target_fd, target_name, overwrite=overwrite)
                    return None
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                copied = _copy(root, source, source_fd, source_name, target, target_fd, target_name, overwrite)
        if copied.skipped:
            raise OSError(errno.EBUSY, f"it has sockets or devices in it, and was copied only: {copied.skipped[0]}")
        remove_tree(source_fd, source_name)
        return copied


def _copy(
    root: Root,
    source: str,
    source_fd: int,
    source_name: bytes,
    target: str,
    target_fd: int,
    target_name: bytes,
    overwrite: bool,
) -> Copied:
    info = os.lstat(source_name, dir_fd=source_fd)
    if not overwrite:
        with suppress(FileNotFoundError):
            os.lstat(target_name, dir_fd=target_fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    elif modes.S_ISDIR(info.st_mode):
        _check_empty(target_fd, target_name)
    temporary = temporary_name()
    try:
        if modes.S_ISDIR(info.st_mode):
            above = root.real(os.path.dirname(os.fsencode(target).rstrip(b"/")) or b".")
            if (above + b"/").startswith(root.real(source).rstrip(b"/") + b"/"):
                raise OSError(errno.EINVAL, "a directory cannot be copied into itself")
            copied = _copy_tree(source_fd, source_name, target_fd, temporary)
        elif _copy_one(source_fd, os.fsdecode(source_name), info, target_fd, temporary):
            made = os.lstat(temporary, dir_fd=target_fd)
            copied = Copied(1, made.st_size if modes.S_ISREG(made.st_mode) else 0, [])
        else:
            raise OSError(errno.EEXIST, "a socket or a device cannot be copied")
        rename(target_fd, temporary, target_fd, target_name, overwrite=overwrite)
    except BaseException:
        with suppress(OSError):
            _remove_copy(target_fd, temporary)
        raise
    return copied


def _check_empty(directory_fd: int, name: bytes) -> None:
    """
    Raise if a directory has entries: it is not replaced, and a copy would be made in vain.

    :raise OSError: ``ENOTEMPTY``.
    """
    try:
        fd = os.open(name, _DIRECTORY, dir_fd=directory_fd)
    except OSError:
        return  # the rename will meet it again, or it can be replaced
    try:
        with os.scandir(fd) as entries:
            if next(entries, None) is not None:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    finally:
        os.close(fd)


def _remove_copy(directory_fd: int, name: str) -> None:
    """
    Remove a copy, complete or not. Its directories may have modes already that keep this user from removing what is in
    them.

    :raise OSError: if it cannot be removed, or there is none.
    """
    if modes.S_ISDIR(os.lstat(name, dir_fd=directory_fd).st_mode):
        _open_up(name, directory_fd)
        for entry in walk(os.open(name, _DIRECTORY, dir_fd=directory_fd)):
            if entry.is_dir:
                _open_up(entry.name, entry.dir_fd)
    remove_tree(directory_fd, os.fsencode(name))


def _open_up(name: str, directory_fd: int) -> None:
    """Set a directory's mode to 0700, without following a link that a command has put there."""
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    finally:
        os.close(fd)


def _copy_tree(source_fd: int, source_name: bytes, target_fd: int, target_name: str) -> Copied:
    with ExitStack() as failed:
        top = os.open(source_name, _DIRECTORY, dir_fd=source_fd)
        failed.callback(os.close, top)
        info = os.fstat(top)
        os.mkdir(target_name, 0o700, dir_fd=target_fd)
        made = os.open(target_name, _DIRECTORY, dir_fd=target_fd)
        failed.callback(os.close, made)
        below = DirectoryTree(os.dup(made))
        failed.pop_all()
    directories: list[tuple[list[str], os.stat_result]] = []
    entries, size = 1, 0
    skipped: list[str] = []
    try:
        for entry in walk(top):
            parts = entry.path.split("/")
            try:
                found = entry.lstat()
                directory = below.directory(parts[:-1])
                if modes.S_ISDIR(found.st_mode):
                    os.mkdir(entry.name, 0o700, dir_fd=directory)
                    if os.geteuid() == 0:
                        os.chown(entry.name, found.st_uid, found.st_gid, dir_fd=directory, follow_symlinks=False)
                    directories.append((parts, found))
                elif not _copy_one(entry.dir_fd, entry.name, found, directory, entry.name):
                    skipped += [entry.path] if len(skipped) < MAX_SKIPPED else []
                    continue
            except FileNotFoundError:
                continue
            entries += 1
            size += found.st_size if modes.S_ISREG(found.st_mode) else 0
        for parts, found in reversed(directories):
            below.settle(parts, modes.S_IMODE(found.st_mode), found.st_mtime_ns)
        _own(info, lambda uid, gid: os.fchown(made, uid, gid))
        os.fchmod(made, modes.S_IMODE(info.st_mode))
        os.utime(made, ns=(info.st_atime_ns, info.st_mtime_ns))
    finally:
        below.close()
        os.close(made)
    return Copied(entries, size, skipped)


def _copy_one(source_fd: int, name: str, info: os.stat_result, target_fd: int, target_name: str) -> bool:
    """
    Copy anything but a directory, to a name that does not exist.

    :return: whether it can be copied at all.
    """
    times = info.st_atime_ns, info.st_mtime_ns
    if modes.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(name, dir_fd=source_fd), target_name, dir_fd=target_fd)
        _own(info, lambda uid, gid: os.chown(target_name, uid, gid, dir_fd=target_fd, follow_symlinks=False))
        os.utime(target_name, ns=times, dir_fd=target_fd, follow_symlinks=False)
        return True
    if modes.S_ISFIFO(info.st_mode):
        os.mkfifo(target_name, 0o600, dir_fd=target_fd)
        fd = os.open(target_name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=target_fd)
        try:
            path = f"/proc/self/fd/{fd}"
            _own(info, lambda uid, gid: os.chown(path, uid, gid))
            os.chmod(path, modes.S_IMODE(info.st_mode))
            os.utime(path, ns=times)
        finally:
            os.close(fd)
        return True
    if not modes.S_ISREG(info.st_mode):
        return False
    fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source_fd)
    try:
        info = os.fstat(fd)
        if not modes.S_ISREG(info.st_mode):
            return False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        new = os.open(target_name, flags, 0o600, dir_fd=target_fd)
        try:
            lock_temporary(new)
            _copy_contents(fd, new, info.st_size)
            _own(info, lambda uid, gid: os.fchown(new, uid, gid))
            os.fchmod(new, modes.S_IMODE(info.st_mode))
            os.utime(new, ns=times)
        finally:
            os.close(new)
    finally:
        os.close(fd)
    return True


def _own(info: os.stat_result, change: Callable[[int, int], None]) -> None:
    """Give a copy the owner of its original, if that is permitted."""
    if os.geteuid() == 0:
        change(info.st_uid, info.st_gid)


def _copy_contents(source: int, target: int, size: int) -> None:
    """Copy a file's contents: by sharing its blocks where the file system can, and without filling its holes."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
    position = 0
    while position < size:
        try:
            begin = os.lseek(source, position, os.SEEK_DATA)
            end = os.lseek(source, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole is left
            begin, end = position, size
        if not _copy_range(source, target, begin, min(end, size)):
            return  # the file has become shorter, or never was as long: files of /sys have the size of a page
        position = end
    if size:
        os.ftruncate(target, max(size, os.fstat(target).st_size))
    else:
        _copy_to_end(source, target)


def _copy_to_end(source: int, target: int) -> None:
    """Copy a file whose size stat(2) does not report, like most files of /proc."""
    while piece := os.read(source, 64 * 1024):
        if os.fstat(target).st_size > MAX_UNSIZED:
            raise OSError(errno.EFBIG, f"a file without a size has more than {MAX_UNSIZED} bytes")
        left = memoryview(piece)
        while left:
            left = left[os.write(target, left) :]


def _copy_range(source: int, target: int, position: int, end: int) -> bool:
    """
    Copy a range of bytes.

    :return: whether it was there, for a file may become shorter meanwhile.
    """
    by_kernel = True
    while position < end:
        count = min(end - position, _PIECE)
        if by_kernel:
            try:
                done = os.copy_file_range(source, target, count, position, position)
            except OSError as error:
                if error.errno not in _UNABLE:
                    raise
                by_kernel = False
                continue
        else:
            data = os.pread(source, min(count, 1024 * 1024), position)
            done = os.pwrite(target, data, position)
        if not done:
            return False
        position += done
    return True
